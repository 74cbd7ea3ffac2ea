"""Models opened for mixing, checked against each other, and their mix written as a checkpoint with its provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphinxkit import checkpoint
from sphinxkit.checkpoint import Checkpoint
from sphinxkit.checkpoint.formats import HuggingFace, TensorFolder
from sphinxkit.errors import CheckpointError, DataError, list_errors
from sphinxkit.interpolation import MixedSource, MixMethod, MixPlan
from sphinxkit.interpolation.rename import LLM_INTO_VLM
from sphinxkit.interpolation.rules import ORDINALS
from sphinxkit.recipe.hf_folder import files_beside, layout_of
from sphinxkit.recipe.open_checkpoints import LLM, no_new_parents, open_all
from sphinxkit.recipe.other_models import check_folders, check_is_by_name, renamed_sources, vocabulary_rules
from sphinxkit.recipe.provenance import LateText, has_sums, provenance
from sphinxkit.recipe.recipe import Recipe

VISION = "vision"
# of a recipe's llm: shapes say it, or it is not in weights
_NOT_THE_MODEL = ("vocab_size", "num_kv_heads", "attention", "max_seq_len", "load_balancing_weight")

_CHAT = ("conversation", "end_ids")  # of a recipe: how answers begin and end


def recipe_differences(first: Checkpoint, second: Checkpoint, llm_only: bool = False) -> list[str]:
    """Where the structure of two models differs although shapes may agree, as ``path: value against value``.

    A vision tower that only one of them has is none: its tensors are missing, which the mix itself reports.
    """
    if not (first.has_recipe and second.has_recipe):
        return []
    found: list[str] = []

    def walk(path: str, a: Any, b: Any) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in dict.fromkeys([*a, *b]):
                if not (path in ("llm", "llm.moe") and key in _NOT_THE_MODEL):
                    walk(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(f"{path}.{index}", x, y)
        elif a != b:
            found.append(f"{path}: {a!r} against {b!r}")

    ours, theirs = Recipe.of_checkpoint(first).resolved(), Recipe.of_checkpoint(second).resolved()
    if HuggingFace.name in (first.format, second.format):  # a base model's folder has no chat template, its own end ids
        ours, theirs = ({key: one[key] for key in one if key not in _CHAT} for one in (ours, theirs))
    if llm_only or not (ours.get(VISION) and theirs.get(VISION)):
        ours, theirs = ({key: value for key, value in one.items() if key != VISION} for one in (ours, theirs))
    walk("", ours, theirs)
    return found


@dataclass
class OpenedMix:
    """Models opened for mixing, and the mix of all their tensors (nothing of it read yet).

    Attributes:
        plan: The mix plan.
        method: The method, built.
        models: The opened models.
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
        if self.models[0].format == TensorFolder.name:
            raise CheckpointError(
                f"{self.models[0].path}: is of a model that this library does not know, so it cannot be loaded; score "
                "it by a command, which gets a directory"
            )
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
            if not path.exists():
                raise CheckpointError(f"tokenizer {path}: there is no such file")
            return path
        if self.models[0].format == TensorFolder.name:  # compared by content; the first one's files come along
            return None
        files = [model.tokenizer_path for model in self.models if model.tokenizer_path is not None]
        if len({file.read_bytes() for file in files}) > 1:
            raise CheckpointError(
                f"the tokenizers differ: {', '.join(map(str, files))}; name the one to keep: tokenizer=FILE"
            )
        return files[0] if files else None

    def check_output(self, output: Path, *, overwrite: bool = False) -> None:
        """Raise if the mix could not be written there, as far as can be said before hours of scoring.

        Raises:
            CheckpointError: The output is one of the inputs, exists already, or its format is unknown or not one for
                these tensors.
        """
        for model in [*self.models, *([self.base] if self.base else [])]:
            if output.exists() and model.path.resolve() == output.resolve():
                raise CheckpointError(f"{output}: is one of the models to mix; write the result somewhere else")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise CheckpointError(f"{output}: exists already; pass overwrite=True to replace it")
        layout = self._layout(self.mixed)
        is_text_only = checkpoint.formats.get_format(layout).is_text_only
        beside = [key for key in self.mixed.keys() if not key.startswith(LLM)]  # noqa: SIM118
        if beside and is_text_only:
            raise CheckpointError(
                f"format {layout!r} holds a language model alone, but the mix also has {beside[0]!r} (and "
                f"{len(beside) - 1} more): pass llm_only=True to leave them out, or "
                "format='sphinxkit' or format='hf' to keep them"
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
        self.check_output(output, overwrite=overwrite)
        first = self.models[0]
        layout = self._layout(mixed)
        num_shards = self.plan.num_shards
        if num_shards is None and layout == first.format and layout in ("sphinx", "meta"):
            num_shards = first.metadata.get("num_shards")
        unused = self.unused_keys()
        carried = mixed.only(lambda key: key in unused)
        keeps_unused = bool(carried.keys()) and checkpoint.formats.get_format(layout).has_unused
        recipe, tokenizer = self._recipe(mixed), self.tokenizer()
        others = files_beside(layout, recipe, tokenizer)
        with no_new_parents(output):
            checkpoint.save(
                output,
                mixed.only(lambda key: key not in unused),
                format=layout,
                part="llm" if self.plan.llm_only else None,
                num_shards=num_shards,
                recipe=recipe,
                tokenizer=tokenizer,
                unused=carried if keeps_unused else None,
                files_of=first,
                extra_files=LateText(lambda: self._provenance(mixed, weights, facts), others),
                overwrite=overwrite,
                progress=progress,
            )

    def _layout(self, mixed: MixedSource) -> str:
        has_vision = any(key.startswith(f"{VISION}.") for key in mixed.keys())  # noqa: SIM118
        return layout_of(self.plan.format or self.models[0].format, has_vision and not self.plan.llm_only)

    def _recipe(self, mixed: MixedSource) -> dict[str, Any] | None:
        if not self.models[0].has_recipe:
            return None
        recipe = Recipe.of_checkpoint(self.models[0]).resolved()
        if not any(key.startswith(f"{VISION}.") for key in mixed.keys()):  # noqa: SIM118
            recipe.pop(VISION, None)
        elif not recipe.get(VISION):  # a rule kept the tower of another model: its description comes along
            others = (Recipe.of_checkpoint(model).resolved() for model in self.models[1:] if model.has_recipe)
            recipe[VISION] = next(filter(None, (other.get(VISION) for other in others)), None)
        embedding = "llm.embed_tokens.weight"
        if "vocab_size" in recipe.get("llm", {}) and embedding in mixed.outcomes:
            recipe["llm"]["vocab_size"] = mixed.shape(embedding)[0]
        return recipe

    def _provenance(self, mixed: MixedSource, weights: Sequence[float], facts: Mapping[str, Any] | None) -> str:
        made = provenance(self.plan, self.models, self.base, mixed, weights)
        return json.dumps({**made, **(facts or {})}, indent=1) + "\n"


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
    opened = [*models, *([base] if base else [])]
    sources = renamed_sources(plan.rename, opened, plan.llm_only)
    is_placed = plan.rename == LLM_INTO_VLM
    return MixedSource(
        sources[: len(models)],
        method,
        weights,
        rules=[*plan.mix_rules(), *(vocabulary_rules(sources) if is_placed else ())],
        base=None if base is None else sources[-1],
        missing="first" if is_placed else "error",
        dtype=None if plan.dtype is None else getattr(torch, plan.dtype),
        allow_nonfinite=plan.allow_nonfinite,
        extrapolate=plan.extrapolate,
        hash_inputs=[i for i, model in enumerate(opened) if not has_sums(model)] if hash_inputs else False,
    )


@contextmanager
def open_mix(plan: MixPlan, *, hash_inputs: bool = True) -> Iterator[OpenedMix]:
    """Open every model of a plan and check that they can be mixed; nothing is read or written yet.

    Args:
        plan: The mix plan.
        hash_inputs: Hash the tensors that are read, for the provenance.
    Raises:
        CheckpointError: A model cannot be opened, or tensors, recipes or tokenizers do not agree.
        DataError: The weights are not valid.
        RecipeError: A rule that matches nothing.
    """
    method = plan.mix_method()
    method.check_base(plan.base is not None)
    chosen = check_weights(plan, method, plan.mix_weights())
    with ExitStack() as stack:
        by_name = plan.format == TensorFolder.name or plan.rename is not None
        every = open_all(
            [*plan.models, *([plan.base] if plan.base else [])], stack, by_name=by_name, overlays=plan.overlays
        )
        models, base = every[: len(plan.models)], every[-1] if plan.base else None
        if check_is_by_name(every, plan.llm_only, plan.format):
            check_folders(plan.rename, every, plan.tokenizer)
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
                f"{_recipe_text(models[0], differences)}\npass allow_different_recipes=True to "
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
        raise DataError(f"beta {plan.beta:g} lies outside [0, 1]; pass extrapolate=True to go beyond the models")
    return method.weights(given, len(plan.models), extrapolate=plan.extrapolate, normalize=plan.normalize)


def _ordinal(index: int) -> str:
    return ORDINALS[index] if index < len(ORDINALS) else f"model {index + 1}"


def _recipe_text(first: Checkpoint, differences: Sequence[str]) -> str:
    return list_errors(f"the recipes differ from that of {first.path}", differences) if differences else ""
