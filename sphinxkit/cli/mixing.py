"""Opening the models that are mixed or compared, and writing what comes of them with its provenance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sphinxkit.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from sphinxkit.checkpoint import Checkpoint
    from sphinxkit.interpolation import MixedSource, MixMethod, MixPlan

PROVENANCE = "provenance.json"
VISION = "vision"
LLM = "llm."  # names of the language model's tensors begin with it
_NOT_THE_MODEL = ("vocab_size", "attention", "max_seq_len")  # of a recipe's llm: shapes say it, or it is not in weights


def open_all(paths: Sequence[str], stack: ExitStack) -> list[Checkpoint]:
    """Open checkpoints (directories or hub ids) that stay open until ``stack`` is left."""
    from sphinxkit import checkpoint

    return [stack.enter_context(checkpoint.open(checkpoint.resolve(path))) for path in paths]


@contextmanager
def no_new_parents(output: Path) -> Iterator[None]:
    """Remove the folders above ``output`` that were made inside of this, if it fails."""
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:  # the nearest first
            with suppress(OSError):
                parent.rmdir()
        raise


def joined(opened: Checkpoint, llm_only: bool = False) -> Any:
    """Everything a checkpoint holds, the unused group under its original names included, or its language model."""
    from sphinxkit.interpolation.sources import JoinedSource

    return JoinedSource([opened, opened.unused], (lambda key: key.startswith(LLM)) if llm_only else None)


def recipe_differences(first: Checkpoint, second: Checkpoint, llm_only: bool = False) -> list[str]:
    """Where the structure of two models differs although shapes may agree, as ``path: value against value``.

    A vision tower that only one of them has is none: its tensors are missing, which the mix itself reports.
    """
    if not (first.has_recipe and second.has_recipe):
        return []
    from sphinxkit.recipe import Recipe

    found: list[str] = []

    def walk(path: str, a: Any, b: Any) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in dict.fromkeys([*a, *b]):
                if not (path == "llm" and key in _NOT_THE_MODEL):
                    walk(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(f"{path}.{index}", x, y)
        elif a != b:
            found.append(f"{path}: {a!r} against {b!r}")

    ours, theirs = Recipe.of_checkpoint(first).resolved(), Recipe.of_checkpoint(second).resolved()
    if llm_only or not (ours.get(VISION) and theirs.get(VISION)):
        ours, theirs = ({key: value for key, value in one.items() if key != VISION} for one in (ours, theirs))
    walk("", ours, theirs)
    return found


@dataclass
class OpenedMix:
    """Models opened for mixing, and the mix of all their tensors (nothing of it read yet).

    Attributes:
        plan: What was asked for.
        method: The method, built.
        models: The models, opened.
        base: The common ancestor, opened, or None.
        mixed: The mix, the unused group included.
    """

    plan: MixPlan
    method: MixMethod
    models: list[Checkpoint]
    base: Checkpoint | None
    mixed: MixedSource

    def with_weights(self, weights: Sequence[float], *, hash_inputs: bool = False) -> MixedSource:
        """The same mix with other weights."""
        return mixed_source(self.plan, self.method, self.models, self.base, weights, hash_inputs=hash_inputs)

    def unused_keys(self) -> set[str]:
        """Names of the unused group over all models."""
        return {key for model in self.models for key in model.unused.keys()}  # noqa: SIM118

    def to_load(self) -> Checkpoint:
        """The first model of the mix's names and shapes, which can be loaded to be overwritten with mixes.

        Raises:
            CheckpointError: There is none: rules drop or keep tensors that no one model holds together.
        """
        unused = self.unused_keys()
        wanted = {key: self.mixed.shape(key) for key in self.mixed.keys() if key not in unused}  # noqa: SIM118
        for model in self.models:
            if {key: tuple(model.shape(key)) for key in model.keys() if self._counts(key)} == wanted:  # noqa: SIM118
                return model
        raise CheckpointError(
            "no model holds the tensors of the mix in their shapes, so none can be updated in memory; score it by a "
            "command, which gets a directory"
        )

    def _counts(self, key: str) -> bool:
        return key.startswith(LLM) or not self.plan.llm_only

    def tokenizer(self) -> Path | None:
        """The tokenizer file of the result.

        Raises:
            CheckpointError: The models' tokenizers differ and the plan names none.
        """
        if self.plan.tokenizer is not None:
            path = Path(self.plan.tokenizer)
            if not path.is_file():
                raise CheckpointError(f"tokenizer {path}: there is no such file")
            return path
        files = [model.tokenizer_path for model in self.models if model.tokenizer_path is not None]
        if len({file.read_bytes() for file in files}) > 1:
            raise CheckpointError(
                f"the tokenizers differ: {', '.join(map(str, files))}; name the one to keep (--tokenizer FILE)"
            )
        return files[0] if files else None

    def check_output(self, output: Path, *, overwrite: bool = False) -> None:
        """Raise if the mix could not be written there, as far as can be said before hours of scoring.

        Raises:
            CheckpointError: The output is one of the inputs, exists already, or its format is unknown or not one for
                these tensors.
        """
        from sphinxkit import checkpoint

        for model in [*self.models, *([self.base] if self.base else [])]:
            if output.exists() and model.path.resolve() == output.resolve():
                raise CheckpointError(f"{output}: is one of the models to mix; write the result somewhere else")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise CheckpointError(f"{output}: exists already; say --overwrite to replace it")
        layout = self.plan.format or self.models[0].format
        if layout not in get_args(checkpoint.Format):
            raise CheckpointError(f"format {layout!r}: expected one of {', '.join(checkpoint.FORMATS)}")
        beside = [key for key in self.mixed.keys() if not key.startswith(LLM)]  # noqa: SIM118
        if beside and layout in ("meta", "hf"):
            raise CheckpointError(
                f"format {layout!r} holds a language model alone, but the mix also has {beside[0]!r} (and "
                f"{len(beside) - 1} more): say --llm-only to leave them out, or --to sphinx or sphinxkit to keep them"
            )

    def write(
        self,
        output: Path,
        mixed: MixedSource,
        weights: Sequence[float],
        *,
        overwrite: bool = False,
        progress: Callable[[str, int], None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a mix as a checkpoint, with its provenance beside it.

        Args:
            output: Directory to make.
            mixed: The mix: ``self.mixed`` or one of :meth:`with_weights`.
            weights: Its weights, for the provenance.
            overwrite: Whether an existing checkpoint may be replaced.
            progress: Told key and bytes of each tensor.
            facts: What else the provenance should say.
        Raises:
            CheckpointError: As :meth:`check_output`, or the output cannot be written.
        """
        from sphinxkit import checkpoint
        from sphinxkit.interpolation.sources import SelectedSource

        self.check_output(output, overwrite=overwrite)
        first = self.models[0]
        layout = self.plan.format or first.format
        shards = self.plan.shards
        if shards is None and layout == first.format and layout in ("sphinx", "meta"):
            shards = first.metadata.get("num_shards")
        unused = self.unused_keys()
        carried = SelectedSource(mixed, lambda key: key in unused)
        with no_new_parents(output):
            checkpoint.save(
                output,
                SelectedSource(mixed, lambda key: key not in unused),
                format=layout,  # type: ignore[arg-type]  # checked above
                part="llm" if self.plan.llm_only else None,
                num_shards=shards,
                recipe=self._recipe(mixed),
                tokenizer=self.tokenizer(),
                unused=carried if carried.keys() else None,
                extra_files=_LateText(lambda: json.dumps(self._provenance(mixed, weights, facts), indent=1) + "\n"),
                overwrite=overwrite,
                progress=progress,
            )

    def _recipe(self, mixed: MixedSource) -> dict[str, Any] | None:
        if not self.models[0].has_recipe:
            return None
        from sphinxkit.recipe import Recipe

        recipe = Recipe.of_checkpoint(self.models[0]).resolved()
        if not any(key.startswith(f"{VISION}.") for key in mixed.keys()):  # noqa: SIM118
            recipe.pop(VISION, None)
        elif not recipe.get(VISION):  # a rule kept the tower of another model: its description comes along
            towers = (Recipe(model.recipe).resolved().get(VISION) for model in self.models[1:] if model.has_recipe)
            recipe[VISION] = next(filter(None, towers), None)
        embedding = "llm.embed_tokens.weight"
        if "vocab_size" in recipe.get("llm", {}) and embedding in mixed.outcomes:
            recipe["llm"]["vocab_size"] = mixed.shape(embedding)[0]
        return recipe

    def _provenance(
        self, mixed: MixedSource, weights: Sequence[float], facts: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        from sphinxkit.version import __version__

        hashes = mixed.input_hashes()
        sources = [*self.models, *([self.base] if self.base else [])]
        inputs = []
        for index, model in enumerate(sources):
            content = hashes[index] if hashes and hashes[index].tensors else None
            inputs.append(
                {
                    "path": str(model.path),
                    "role": "base" if model is self.base else "model",
                    "weight": None if model is self.base else weights[index],
                    "format": model.format,
                    "files": [file_facts(model, path) for path in model.files],
                    "content": {"tensors": content.tensors, "sha256": content.sha256} if content else None,
                }
            )
        kinds = [plan.kind for plan in mixed.outcomes.values()]
        return {
            "made_by": f"sphinxkit {__version__} mix",
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": self.plan.method,
            "weights": list(weights),
            "beta": weights[0] if len(weights) == 2 else None,
            "rules": self.plan.rules,
            "dtype": self.plan.dtype,
            "llm_only": self.plan.llm_only,
            "inputs": inputs,
            "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            **(facts or {}),
        }


class _LateText(Mapping[str, str]):
    """The provenance file, whose text is made when everything else has been written and hashed."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text

    def __getitem__(self, name: str) -> str:
        if name != PROVENANCE:
            raise KeyError(name)
        return self._text()

    def __iter__(self) -> Iterator[str]:
        return iter([PROVENANCE])

    def __len__(self) -> int:
        return 1


def file_facts(model: Checkpoint, path: Path) -> dict[str, Any]:
    """Name and size of a checkpoint's file, and its SHA-256 where the checkpoint's own index records it."""
    recorded = model.metadata.get("files")
    facts = recorded.get(path.name, {}) if isinstance(recorded, Mapping) else {}
    found = {"name": path.name, "size": path.stat().st_size}
    return {**found, "sha256": facts["sha256"]} if facts.get("sha256") else found


def mixed_source(
    plan: MixPlan,
    method: MixMethod,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    weights: Sequence[float] | None,
    *,
    hash_inputs: bool = False,
) -> MixedSource:
    """The mix of opened models that a plan describes, the unused group included.

    With ``hash_inputs``, models whose own index records their files' SHA-256 are not hashed again.
    """
    import torch

    from sphinxkit import interpolation

    opened = [*models, *([base] if base else [])]
    return interpolation.MixedSource(
        [joined(model, plan.llm_only) for model in models],
        method,
        weights,
        rules=plan.mix_rules(),
        base=None if base is None else joined(base, plan.llm_only),
        dtype=None if plan.dtype is None else getattr(torch, plan.dtype),
        allow_nonfinite=plan.allow_nonfinite,
        extrapolate=plan.extrapolate,
        hash_inputs=[i for i, model in enumerate(opened) if not _has_sums(model)] if hash_inputs else False,
    )


def _has_sums(model: Checkpoint) -> bool:
    return all("sha256" in file_facts(model, path) for path in model.files)


@contextmanager
def open_mix(plan: MixPlan, *, hash_inputs: bool = True, weights: Sequence[float] | None = None) -> Iterator[OpenedMix]:
    """Open every model of a plan and check that they can be mixed; nothing is read or written yet.

    Args:
        plan: What to mix.
        hash_inputs: Hash the tensors that are read, for the provenance.
        weights: Instead of the plan's.
    Raises:
        CheckpointError: A model cannot be opened, or tensors, recipes or tokenizers do not agree.
        DataError: Weights that cannot be used.
        RecipeError: A rule that matches nothing.
    """
    method = plan.mix_method()
    if method.needs_base and plan.base is None:
        raise DataError(f"{method.name} adds differences to a common ancestor: name it (--base MODEL)")
    chosen = check_weights(plan, method, plan.mix_weights() if weights is None else weights)
    with ExitStack() as stack:
        models = open_all(plan.models, stack)
        base = open_all([plan.base], stack)[0] if plan.base else None
        others = [*models[1:], *([base] if base else [])]
        differences = [
            f"{other.path}: {line}"
            for other in others
            for line in recipe_differences(models[0], other, llm_only=plan.llm_only)
        ]
        try:
            mixed = mixed_source(plan, method, models, base, chosen, hash_inputs=hash_inputs)
        except CheckpointError as error:
            names = "".join(f"\n  {_ordinal(index)}: {model.path}" for index, model in enumerate(models))
            text = _recipe_text(models[0], differences)
            raise CheckpointError(f"{error}{names}" + (f"\n{text}" if text else "")) from error
        if differences and not plan.allow_different_recipes:
            raise CheckpointError(
                f"{_recipe_text(models[0], differences)}\nsay allow_different_recipes (--allow-different-recipes) to "
                "mix them anyway with the first one's recipe"
            )
        opened = OpenedMix(plan, method, models, base, mixed)
        opened.tokenizer()
        yield opened


def check_weights(plan: MixPlan, method: MixMethod, given: Sequence[float] | None) -> tuple[float, ...]:
    """The weights of a plan, checked, with the word beta in the message where that was said.

    Raises:
        DataError: Weights are missing or cannot be used.
    """
    if plan.beta is not None and not 0 <= plan.beta <= 1 and not plan.extrapolate:
        raise DataError(
            f"beta {plan.beta:g} lies outside [0, 1]; say extrapolate (--extrapolate) to go beyond the models"
        )
    return method.weights(given, len(plan.models), extrapolate=plan.extrapolate, normalize=plan.normalize)


def _ordinal(index: int) -> str:
    from sphinxkit.interpolation.rules import ORDINALS

    return ORDINALS[index] if index < len(ORDINALS) else f"model {index + 1}"


def _recipe_text(first: Checkpoint, differences: Sequence[str]) -> str:
    from sphinxkit.interpolation.outcomes import listed

    return listed(differences, f"the recipes differ from that of {first.path}") if differences else ""


def total_bytes(mixed: MixedSource) -> int:
    """Size of a mix's tensors, for a progress bar."""
    return sum(math.prod(plan.shape) * plan.dtype.itemsize for plan in mixed.outcomes.values())


def file_name(path: str | os.PathLike[str]) -> str:
    """Last part of a path, for labels."""
    return Path(path).name or str(path)
