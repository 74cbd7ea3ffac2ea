"""Decides how each tensor of a mix is made, from names, shapes and dtypes, before any data is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sphinxkit.errors import CheckpointError, DataError, list_errors
from sphinxkit.interpolation.method import MixMethod, common_dtype
from sphinxkit.interpolation.rules import Rule, RuleBook
from sphinxkit.tensor_source import TensorSource

Missing = Literal["error", "keep", "first"]


@dataclass(frozen=True)
class Outcome:
    """How one tensor of the result is made.

    Attributes:
        kind: ``mix`` by ``method`` and ``weights``; ``keep`` the tensor of ``model`` bit for bit; ``equal``: not
            floating point, so all models must hold the same bits; ``overlap``: the first ``common`` elements are
            mixed, the rest are ``model``'s.
        shape: Of the result.
        dtype: Dtype of the result.
        model: Whose tensor is kept; -1 is the base.
        weights: One per model.
        method: How ``mix`` and ``overlap`` combine.
        common: Number of leading elements that ``overlap`` mixes.
    """

    kind: Literal["mix", "keep", "equal", "overlap"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    model: int = 0
    weights: tuple[float, ...] = ()
    method: MixMethod | None = None
    common: int = 0


class Decision:
    """Decides every tensor of a mix, or raises one error that lists all that does not fit.

    Args:
        sources: The models.
        base: The common ancestor, for the methods that need one.
        names: Names of the models in messages; default first, second, ...
        method: For tensors without a rule.
        weights: Their weights, checked.
        rules: Exceptions by name.
        dtype: Dtype of all floating-point tensors of the result; None keeps what the models share, "first" what the
            first model that holds a tensor has.
        extrapolate: Allow weights outside [0, 1] in rules.
        missing: "error"; "keep": a tensor that not every model holds is kept from the first that does; "first": one
            that only the first model holds is kept.
    """

    def __init__(
        self,
        sources: Sequence[TensorSource],
        base: TensorSource | None,
        names: Sequence[str],
        method: MixMethod,
        weights: Sequence[float],
        rules: RuleBook,
        dtype: torch.dtype | Literal["first"] | None,
        extrapolate: bool = False,
        missing: Missing = "error",
    ) -> None:
        self._sources = list(sources)
        self._base = base
        self._names = list(names)
        self._method = method
        self._weights = tuple(weights)
        self._rules = rules
        self._dtype = dtype
        self._extrapolate = extrapolate
        self._missing = missing
        self._held = [set(source.keys()) for source in sources]
        self._base_held = set(base.keys()) if base else set()
        self._methods: dict[int, tuple[MixMethod, tuple[float, ...]]] = {}

    def outcomes(self) -> dict[str, Outcome]:
        """What becomes of every tensor of the result, in the first model's order, then the others'.

        Raises:
            CheckpointError: Names or shapes differ without a rule; every one is listed.
            DataError: A rule's weights or method cannot be used.
        """
        every = list(dict.fromkeys(key for source in self._sources for key in source.keys()))  # noqa: SIM118
        found: dict[str, Outcome] = {}
        missing: dict[tuple[int, ...], list[str]] = {}
        errors: list[str] = []
        for key in every:
            rule = self._rules.find(key)
            if rule and rule.kind == "drop":
                continue
            try:
                if rule and rule.kind == "keep":
                    found[key] = self._keep(key, rule.model)
                    continue
                holders = tuple(index for index, held in enumerate(self._held) if key in held)
                if len(holders) < len(self._sources) and (
                    self._missing == "keep" or (self._missing == "first" and holders == (0,))
                ):
                    found[key] = self._keep(key, holders[0])
                    continue
                if len(holders) < len(self._sources):
                    missing.setdefault(holders, []).append(key)
                    continue
                found[key] = self._mix(key, rule)
            except CheckpointError as error:
                errors.append(str(error))
        for holders, keys in missing.items():
            where = " and ".join(self._names[index] for index in holders)
            shown = ", ".join(keys[:6]) + (f", ... ({len(keys)} in all)" if len(keys) > 6 else "")
            errors.append(f"only in {where}: {shown}")
        if errors:
            hint = (
                "name what should happen in a rule: 'PATTERN: keep first', 'PATTERN: drop' or 'PATTERN: overlap first'"
            )
            raise CheckpointError(list_errors("the models do not hold the same tensors", errors) + f"\n{hint}")
        return found

    def _source(self, model: int) -> TensorSource:
        if model >= 0:
            return self._sources[model]
        if self._base is None:
            raise DataError("a rule names the base, but there is no base model")
        return self._base

    def _keep(self, key: str, model: int) -> Outcome:
        source = self._source(model)
        if key not in (self._held[model] if model >= 0 else self._base_held):
            name = self._names[model] if model >= 0 else "base"
            raise CheckpointError(f"{key}: to be kept from {name}, which does not hold it")
        return Outcome("keep", tuple(source.shape(key)), self._out(source.dtype(key)), model=model)

    def _out(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if isinstance(self._dtype, torch.dtype) and stored.is_floating_point else stored

    def _mixed_dtype(self, first: torch.dtype, used: Sequence[torch.dtype]) -> torch.dtype:
        if isinstance(self._dtype, torch.dtype):
            return self._dtype
        return first if self._dtype == "first" else common_dtype(used)

    def _how(self, rule: Rule | None) -> tuple[MixMethod, tuple[float, ...]]:
        if rule is None or (rule.weights is None and rule.method is None):
            return self._method, self._weights
        if id(rule) not in self._methods:
            method = rule.method or self._method
            if method.needs_base and self._base is None:
                raise DataError(f"rule {rule.pattern!r}: {method.name} needs a base model")
            try:
                inherited = self._weights if method.takes_weights else None
                given = inherited if rule.weights is None else rule.weights
                weights = method.weights(given, len(self._sources), extrapolate=self._extrapolate)
            except DataError as error:
                raise DataError(f"rule {rule.pattern!r}: {error}") from error
            self._methods[id(rule)] = method, weights
        return self._methods[id(rule)]

    def _mix(self, key: str, rule: Rule | None) -> Outcome:
        method, weights = self._how(rule)
        sources = [*self._sources, self._base] if method.needs_base and self._base is not None else self._sources
        names = [*self._names, "base"]
        if method.needs_base and key not in self._base_held:
            raise CheckpointError(f"{key}: the base does not hold it")
        shapes = [tuple(source.shape(key)) for source in sources]
        if rule and rule.kind == "overlap":
            return self._overlap(key, shapes, rule.model, method, weights)
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise CheckpointError(_shape_error(key, shapes[0], shape, names[0], names[index]))
        dtypes = [source.dtype(key) for source in sources]
        copy = method.copy_of(weights)
        if copy is not None:
            return Outcome("keep", shapes[0], self._out(self._source(copy).dtype(key)), model=copy)
        if not all(dtype.is_floating_point for dtype in dtypes):
            if len(set(dtypes)) > 1:
                raise CheckpointError(f"{key}: stored as {', '.join(map(str, dtypes))}, which cannot be mixed")
            return Outcome("equal", shapes[0], dtypes[0], weights=weights)
        used = [dtypes[index] for index, weight in enumerate(weights) if weight != 0]
        used += dtypes[len(self._sources) :]
        return Outcome("mix", shapes[0], self._mixed_dtype(dtypes[0], used), weights=weights, method=method)

    def _overlap(
        self, key: str, shapes: list[tuple[int, ...]], model: int, method: MixMethod, weights: tuple[float, ...]
    ) -> Outcome:
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            shown = ", ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"{key}: overlap wants shapes that differ in the first dimension only, got {shown}")
        own = self._source(model)
        shape = tuple(own.shape(key))
        rows = min(one[0] for one in shapes)
        common = rows * (torch.Size(shape[1:]).numel() if len(shape) > 1 else 1)
        stored = [source.dtype(key) for source in [*self._sources, own]]
        dtype = self._mixed_dtype(stored[0], stored)
        return Outcome("overlap", shape, dtype, model=model, weights=weights, method=method, common=common)


def _shape_error(key: str, ours: tuple[int, ...], theirs: tuple[int, ...], our_name: str, their_name: str) -> str:
    text = f"{key}: {list(ours)} in {our_name}, {list(theirs)} in {their_name}"
    if ours and theirs and ours[1:] == theirs[1:]:
        low, high = sorted((ours[0], theirs[0]))
        longer = our_name if ours[0] > theirs[0] else their_name
        rows = f"row {low} exists" if high == low + 1 else f"rows {low} to {high - 1} exist"
        text += f": {rows} only in {longer} ('{key}: overlap first' mixes rows 0 to {low - 1})"
    return text
