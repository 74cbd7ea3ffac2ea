"""A mix as data: the content of a mix recipe or of the command line's options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sphinxkit.errors import DataError, RecipeError, RegistryError
from sphinxkit.hub import as_text, is_nano
from sphinxkit.interpolation.method import MixMethod, build_method
from sphinxkit.interpolation.rename import LLM_INTO_VLM
from sphinxkit.interpolation.rules import Rule, parse_rules

DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass
class MixPlan:
    """Which models are mixed, and how.

    Attributes:
        models: Paths or hub ids, two or more (one is a copy).
        method: Registered name, or ``{type: name, option: value, ...}``.
        beta: Weight of the first of two models; the second gets ``1 - beta``.
        weights: One per model, instead of ``beta``.
        normalize: Divide the weights by their sum.
        base: The common ancestor, for task_arithmetic, ties and dare.
        rules: Name pattern -> action for matching tensors; the first match applies. See
            :func:`sphinxkit.interpolation.rules.parse_rule`.
        dtype: Of the result: float32, float16, bfloat16, float64; None keeps what the models have.
        format: Layout of the result: sphinxkit, sphinx, meta, hf, or safetensors (folders of any model, by their files'
            own names); None takes the first model's, and safetensors where a folder is of no known model.
        rename: Prefixes of the names of all models but the first (the base, too) and what replaces them; or
            ``llm_into_vlm``: the others are language models, whose place in the first is found from the names. What
            only the first holds is kept then, and so are its rows of the vocabulary that they do not have.
        overlays: For each model in order a tuned directory that is laid over it before the mix, or null.
        num_shards: Tensor-parallel shards of the result (sphinx and meta); None: the first model's, if the format is.
        llm_only: Mix and write the language models alone; other tensors are left out and may differ.
        tokenizer: File to put beside the result, for models whose tokenizers differ.
        allow_nonfinite: Allow NaN and Inf.
        extrapolate: Allow weights outside [0, 1].
        allow_different_recipes: Allow models with different recipes; the result has the first model's.
    Raises:
        RecipeError: Values contradict each other; all are listed.
    """

    models: list[str]
    method: str | dict[str, Any] = "linear"
    beta: float | None = None
    weights: list[float] | None = None
    normalize: bool = False
    base: str | None = None
    rules: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    format: str | None = None
    rename: str | dict[str, str] | None = None
    overlays: list[str | None] = field(default_factory=list)
    num_shards: int | None = None
    llm_only: bool = False
    tokenizer: str | None = None
    allow_nonfinite: bool = False
    extrapolate: bool = False
    allow_different_recipes: bool = False

    def __post_init__(self) -> None:
        errors = []
        if not self.models:
            errors.append("models: name at least one")
        if self.beta is not None and self.weights is not None:
            errors.append("beta, weights: give one of them")
        if self.beta is not None and len(self.models) != 2:
            errors.append(f"beta: is between two models, but there are {len(self.models)}; give weights")
        if self.dtype is not None and self.dtype not in DTYPES:
            errors.append(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.overlays and len(self.overlays) != len(self.models):
            errors.append(f"overlays: {len(self.overlays)} for {len(self.models)} models; null stands for none")
        if isinstance(self.rename, str) and self.rename != LLM_INTO_VLM:
            errors.append(f"rename: expected prefixes and their replacements or {LLM_INTO_VLM}, got {self.rename!r}")
        if isinstance(self.method, Mapping) and not isinstance(self.method.get("type"), str):
            errors.append(f"method: expected a name or {{type: name, ...}}, got {dict(self.method)!r}")
        else:
            try:
                self.mix_method()
            except (RegistryError, DataError) as error:
                errors.append(f"method: {error}")
        try:
            self.mix_rules()
        except RecipeError as error:
            errors += [f"rules: {line}" for line in str(error).splitlines()]
        if errors:
            raise RecipeError("\n".join(errors))

    def mix_weights(self) -> Sequence[float] | None:
        """One weight per model, or None for the method's default."""
        return (self.beta, 1 - self.beta) if self.beta is not None else self.weights

    def mix_method(self) -> MixMethod:
        """The method, built.

        Raises:
            RegistryError: Unknown name or option.
            DataError: An option's value is not possible.
        """
        return build_method(self.method)

    def mix_rules(self) -> list[Rule]:
        """The rules, parsed."""
        return parse_rules(self.rules, len(self.models))

    def relative_to(self, folder: str | os.PathLike[str]) -> MixPlan:
        """The same plan with relative paths that exist below ``folder`` taken from there."""

        def find(path: str) -> str:
            below = Path(folder) / path
            is_elsewhere = is_nano(path) or Path(path).is_absolute() or not below.exists()
            return path if is_elsewhere else as_text(below)

        return replace(
            self,
            models=[find(model) for model in self.models],
            base=find(self.base) if self.base else None,
            overlays=[each and find(each) for each in self.overlays],
            tokenizer=find(self.tokenizer) if self.tokenizer else None,
        )
