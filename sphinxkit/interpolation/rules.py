"""Rules that say, by pattern, how the tensors of some parts or layers are mixed."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sphinxkit.errors import DataError, RecipeError, RegistryError
from sphinxkit.interpolation.method import MixMethod, build_method
from sphinxkit.registry import suggest

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_WORDS = "a number (beta), a list of weights, 'keep first', 'overlap first', 'drop' or {method: ..., ...}"

RuleKind = Literal["mix", "keep", "overlap", "drop"]


@dataclass(frozen=True)
class Rule:
    """Action for tensors whose name matches a pattern.

    Attributes:
        pattern: Name with ``*`` (any characters, dots too), ``?``, ``[abc]`` and braces (``{0..15}``, ``{0..30..2}``,
            ``{q,k,v}``).
        kind: ``mix`` (with ``weights`` and ``method``, each optional), ``keep`` (bit for bit from ``model``),
            ``overlap`` (shape of ``model``; the block that all have in common is mixed, the rest is ``model``'s) or
            ``drop``.
        model: Index of the model that keep and overlap name; negative for the base model.
        weights: One per model, or None for those of the whole mix.
        method: Another mixing method for these tensors, or None.
    """

    pattern: str
    kind: RuleKind
    model: int = 0
    weights: tuple[float, ...] | None = None
    method: MixMethod | None = None


def expand_braces(pattern: str) -> list[str]:
    """Every pattern that the braces of ``pattern`` stand for, in order.

    Raises:
        RecipeError: A brace is not closed or opened, or stands for nothing.
    """
    found = _BRACES.search(pattern)
    if not found:
        if "{" in pattern or "}" in pattern:
            raise RecipeError(f"pattern {pattern!r} has a brace without its partner")
        return [pattern]
    inside = found.group(1)
    numbers = _RANGE.fullmatch(inside)
    if numbers:
        first, last, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1)
        if last < first or step < 1:
            raise RecipeError(
                f"pattern {pattern!r}: the range {{{inside}}} is empty; write it upwards, both ends count"
            )
        choices = [str(number) for number in range(first, last + 1, step)]
    elif "," in inside:
        choices = [choice.strip() for choice in inside.split(",")]
    else:
        raise RecipeError(f"pattern {pattern!r}: {{{inside}}} is neither a range {{0..15}} nor a list {{q,k,v}}")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [whole for choice in choices for whole in expand_braces(head + choice + tail)]


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{fnmatch.translate(one)})" for one in expand_braces(pattern)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _model_index(word: str, num_models: int, where: str) -> int:
    if word == "base":
        return -1
    index = ORDINALS.index(word) if word in ORDINALS else int(word) - 1 if word.isdigit() else -1
    if not 0 <= index < num_models:
        known = [*ORDINALS[:num_models], "base"]
        raise RecipeError(f"{where}: {word!r} names no model; there are {', '.join(known)}{suggest(word, known)}")
    return index


def _weights(value: Any, num_models: int, where: str) -> tuple[float, ...]:
    if _is_number(value):
        if num_models != 2:
            raise RecipeError(
                f"{where}: one number is a beta between two models, but there are {num_models}: list them"
            )
        return float(value), 1 - float(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(_is_number, value)):
        raise RecipeError(f"{where}: weights must be finite numbers, got {value!r}")
    if len(value) != num_models:
        raise RecipeError(f"{where}: {len(value)} weights for {num_models} models")
    return tuple(float(weight) for weight in value)


def _method(value: Any, where: str) -> MixMethod | None:
    if value is None:
        return None
    if not isinstance(value, str) and not (isinstance(value, Mapping) and isinstance(value.get("type"), str)):
        raise RecipeError(f"{where}: method must be a name or {{type: name, ...}}, got {value!r}")
    try:
        return build_method(value)
    except (RegistryError, DataError) as error:
        raise RecipeError(f"{where}: {error}") from error


def parse_rule(pattern: str, action: Any, num_models: int) -> Rule:
    """One rule from a pattern and what a recipe or the command line says about it.

    Args:
        pattern: See :class:`Rule`.
        action: A number (beta: the weight of the first of two models), a list of weights, ``"keep first"``,
            ``"overlap second"``, ``"drop"``, or a mapping with ``method`` (a name or ``{type: name, option: value}``)
            and / or ``beta`` or ``weights``.
        num_models: How many models are mixed, the base not counted.
    Raises:
        RecipeError: The pattern or the action cannot be understood; the message says which.
    """
    where = f"rule {pattern!r}"
    expand_braces(pattern)
    if isinstance(action, Mapping):
        rest = dict(action)
        method = _method(rest.pop("method", None), where)
        given = [name for name in ("beta", "weights") if name in rest]
        if len(given) > 1:
            raise RecipeError(f"{where}: give beta or weights, not both")
        weights = _weights(rest.pop(given[0]), num_models, where) if given else None
        if rest:
            raise RecipeError(f"{where}: unknown {', '.join(map(repr, rest))}; known are method, beta and weights")
        return Rule(pattern, "mix", weights=weights, method=method)
    if isinstance(action, str):
        words = action.split()
        if words == ["drop"]:
            return Rule(pattern, "drop")
        if len(words) == 2 and words[0] == "keep":
            return Rule(pattern, "keep", model=_model_index(words[1], num_models, where))
        if len(words) == 2 and words[0] == "overlap":
            return Rule(pattern, "overlap", model=_model_index(words[1], num_models, where))
        raise RecipeError(f"{where}: expected {_WORDS}, got {action!r}")
    return Rule(pattern, "mix", weights=_weights(action, num_models, where))


def parse_rules(rules: Mapping[str, Any] | Iterable[tuple[str, Any]], num_models: int) -> list[Rule]:
    """Rules in the order given, from a recipe's mapping or from pairs; see :func:`parse_rule`.

    Raises:
        RecipeError: Every rule that cannot be understood, one line each.
    """
    parsed, errors = [], []
    for pattern, action in rules.items() if isinstance(rules, Mapping) else rules:
        try:
            parsed.append(parse_rule(pattern, action, num_models))
        except RecipeError as error:
            errors.append(str(error))
    if errors:
        raise RecipeError("\n".join(errors))
    return parsed


def parse_assignment(text: str) -> tuple[str, Any]:
    """``PATTERN=ACTION`` of the command line as a pattern and an action.

    Raises:
        RecipeError: There is no ``=``.
    """
    pattern, equals, action = text.partition("=")
    if not equals or not pattern.strip() or not action.strip():
        raise RecipeError(f"rule {text!r}: expected PATTERN=ACTION, for example 'vision.*=keep first'")
    pattern, action = pattern.strip(), action.strip()
    try:
        numbers = [float(number) for number in action.split(",")]
    except ValueError:
        return pattern, action
    return pattern, numbers[0] if len(numbers) == 1 else numbers


class RuleBook:
    """Rules by which names are looked up; the first that matches decides.

    Args:
        rules: In order of precedence.
    Raises:
        RecipeError: A pattern's braces cannot be understood.
    """

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = tuple(rules)
        self._compiled = [(rule, _compile(rule.pattern)) for rule in rules]

    def find(self, name: str) -> Rule | None:
        """The first rule whose pattern matches the whole of ``name``."""
        return next((rule for rule, pattern in self._compiled if pattern.match(name)), None)

    def check(self, names: Iterable[str]) -> None:
        """Raise if a rule matches none of ``names``: it would do nothing, so it is probably misspelt.

        Raises:
            RecipeError: The message lists those rules.
        """
        names = list(names)
        idle = [rule.pattern for rule, pattern in self._compiled if not any(map(pattern.match, names))]
        if idle:
            listed = ", ".join(f"{pattern!r}{suggest(pattern, names)}" for pattern in idle)
            raise RecipeError(f"no tensor has a name like {listed}")
