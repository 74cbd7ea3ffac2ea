"""Canonical tensor names and the names that a format uses: rules as data, and their use in both directions.

A rule pairs two templates. ``{}`` stands for a layer number and a trailing ``*`` for the rest of a name; both sides
have the same wildcards in the same order, so every rule can be run backwards. The first rule that fits wins. The rules
of a format stand in its file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Rotary = Literal["query", "key", "head"]


@dataclass(frozen=True)
class NameRule:
    """One pair of templates and what is special about the tensors they name.

    Attributes:
        theirs: Template in the other format.
        ours: Template in canonical names.
        split_dim: Dimension that tensor-parallel shards split; None: every shard holds the whole tensor.
        rotary: Set where the other format orders the rows in halves instead of pairs (Hugging Face's q and k;
            "head": the norms of one head's).
        is_flat: Whether the other format joins the first two dimensions (experts and their rows) into one.
    """

    theirs: str
    ours: str
    split_dim: int | None = None
    rotary: Rotary | None = None
    is_flat: bool = False

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        return _compile(self.theirs), _compile(self.ours)

    def to_ours(self, name: str) -> str | None:
        """The canonical name of ``name``, or None where the rule does not fit."""
        return _translate(self._patterns[0], self.ours, name)

    def to_theirs(self, name: str) -> str | None:
        """The other format's name of the canonical ``name``, or None where the rule does not fit."""
        return _translate(self._patterns[1], self.theirs, name)


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"([0-9]{1,9})").replace(r"\*", r"(.+)"))


def _translate(pattern: re.Pattern[str], template: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    return template.replace("*", "{}").format(*match.groups()) if match else None


@dataclass(frozen=True)
class KeyMap:
    """The rules of one format.

    Attributes:
        rules: Tried in order.
        unused: Patterns of names that the format stores but no model uses; they have no canonical name.
        derived: Patterns of names that are computed from the configuration (rotary tables); they are skipped.
    """

    rules: Sequence[NameRule]
    unused: Sequence[str] = ()
    derived: Sequence[str] = ()

    def is_unused(self, name: str) -> bool:
        """Whether the other format's ``name`` belongs to the unused group."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)

    def is_derived(self, name: str) -> bool:
        """Whether the other format's ``name`` is computed from the configuration and need not be read."""
        return any(re.fullmatch(pattern, name) for pattern in self.derived)

    def to_ours(self, name: str) -> tuple[str, NameRule] | None:
        """Canonical name and rule of the other format's ``name``; None where no rule fits."""
        for rule in self.rules:
            if (ours := rule.to_ours(name)) is not None:
                return ours, rule
        return None

    def to_theirs(self, name: str) -> tuple[str, NameRule] | None:
        """The other format's name and rule of the canonical ``name``; None where no rule fits."""
        for rule in self.rules:
            if (theirs := rule.to_theirs(name)) is not None:
                return theirs, rule
        return None
