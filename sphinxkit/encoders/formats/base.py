"""Tensor names of published formats: rules as data, and their application."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.tensor_files import StoredTensor

Configs = Mapping[str, Mapping[str, Any]]
"""The JSON files beside the tensors, by name: ``config.json``, ``open_clip_config.json``."""


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\*", r"(.+)"))


def join(parts: Sequence[Tensor]) -> Tensor:
    """One tensor from its parts, along the first dimension; a single part is itself.

    Shape:
        parts: (n_i, ...)
        return: (sum n_i, ...)
    """
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class NameRule:
    """How a format stores one of our tensors.

    ``{}`` stands for a layer number and a trailing ``*`` for the rest of a name; all templates have the same wildcards
    in the same order.

    Args:
        theirs: Template of the tensor in the format, or of each of its parts.
        ours: Template of the trunk's tensor.
        combine: Makes ours of theirs.
    """

    theirs: tuple[str, ...]
    ours: str
    combine: Callable[[Sequence[Tensor]], Tensor] = join

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [_compile(template) for template in self.theirs]

    def match(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """Our name of the format's ``name`` and the names of all its parts; None where the rule does not fit."""
        for pattern in self._patterns:
            if found := pattern.fullmatch(name):
                fill = [template.replace("*", "{}").format(*found.groups()) for template in (self.ours, *self.theirs)]
                return fill[0], tuple(fill[1:])
        return None


@dataclass(frozen=True)
class FoundTensor:
    """One of our tensors as the files hold it; nothing is read yet.

    Args:
        parts: What it is made of.
        combine: Makes it of them.
        shape: Of the result.
    """

    parts: tuple[StoredTensor, ...]
    combine: Callable[[Sequence[Tensor]], Tensor]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes to read for it."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts)

    def read(self) -> Tensor:
        """The tensor on the CPU in its stored dtype; do not write to it."""
        return self.combine([part.read() for part in self.parts])

    @classmethod
    def of(cls, parts: Sequence[StoredTensor], combine: Callable[[Sequence[Tensor]], Tensor] = join) -> FoundTensor:
        """From its parts; the shape comes from a pass on the meta device. Shape: parts: what ``combine`` takes."""
        blank = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts]
        return cls(tuple(parts), combine, tuple(combine(blank).shape))


@dataclass
class Translation:
    """The tensors of files under our names.

    Args:
        found: By our name.
        skipped: Names in the files of what SPHINX does not use.
        errors: Tensors that the format does not know, and parts that are missing.
        resampled: Descriptions of resampled tensors.
    """

    found: dict[str, FoundTensor] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)


def _says_nothing(configs: Configs) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class WeightFormat:
    """A published layout of an encoder's weights, told apart by tensor names.

    Args:
        name: For messages.
        marks: Patterns, each of which fits the name of some tensor in every file of the format.
        rules: Tried in order; the first that fits wins.
        skipped: Patterns of names that SPHINX does not use: text towers, heads, tables computed from the configuration.
        options: What the files say about the network beside its shapes, in words of our builder: ``activation``,
            ``num_heads``, ``norm_eps``, ... Only what they do say.
        prefix: Before our names: where in the encoder they are.
        usual_activation: What weights of the format were mostly trained with, for files that do not say; "" where
            there is no choice.
        note: What to say beside the list of missing tensors.
        joins_files: Whether the format is published in several files without an index.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[NameRule, ...]
    skipped: tuple[str, ...] = ()
    options: Callable[[Configs], dict[str, Any]] = _says_nothing
    prefix: str = "trunk."
    usual_activation: str = ""
    note: str = ""
    joins_files: bool = False

    def fits(self, names: Collection[str]) -> bool:
        """Whether files that hold tensors of these names are of this format."""
        return all(any(re.fullmatch(mark, name) for name in names) for mark in self.marks)

    def skips(self, name: str) -> bool:
        """Whether the tensor of this name is not used."""
        return any(re.fullmatch(pattern, name) for pattern in self.skipped)

    def _rule(self, name: str) -> tuple[NameRule, tuple[str, tuple[str, ...]]] | tuple[None, None]:
        for rule in self.rules:
            if match := rule.match(name):
                return rule, match
        return None, None

    def translate(self, tensors: Mapping[str, StoredTensor], trunk: nn.Module) -> Translation:
        """The files' tensors under our names.

        Args:
            tensors: By the files' names.
            trunk: The network that they are for.
        """
        result = Translation()
        for name in tensors:
            if self.skips(name):
                result.skipped.append(name)
                continue
            rule, match = self._rule(name)
            if rule is None or match is None:
                result.errors.append(f"{name!r} is not known to this format")
                continue
            ours, theirs = self.prefix + match[0], match[1]
            if ours in result.found:
                continue  # another of its parts came before
            missing = [part for part in theirs if part not in tensors]
            if missing:
                result.errors.append(f"{', '.join(map(repr, missing))} is missing beside {name!r}")
                continue
            result.found[ours] = FoundTensor.of([tensors[part] for part in theirs], rule.combine)
        return result


def named(*pairs: tuple[str, str]) -> tuple[NameRule, ...]:
    """Rules that only rename: (theirs, ours)."""
    return tuple(NameRule((theirs,), ours) for theirs, ours in pairs)


SPHINXKIT = WeightFormat("sphinxkit", marks=(r"trunk\..+",), rules=named(("*", "*")), prefix="")
"""An encoder's own names, as its state dict has them."""
