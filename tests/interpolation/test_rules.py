from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.interpolation.methods.ties import Ties
from sphinxkit.interpolation.rules import RuleBook, expand_braces, parse_assignment, parse_rule, parse_rules


def test_braces_by_hand() -> None:
    assert expand_braces("llm.layers.{0..3}.*") == [f"llm.layers.{i}.*" for i in range(4)]
    assert expand_braces("a{8..12..2}") == ["a8", "a10", "a12"]
    assert expand_braces("{q,k}_{0..1}") == ["q_0", "q_1", "k_0", "k_1"]
    assert expand_braces("plain.*") == ["plain.*"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a{0..3", "brace without its partner"),
        ("a0..3}", "brace without its partner"),
        ("a{3..0}", "range {3..0} is empty"),
        ("a{0..4..0}", "range {0..4..0} is empty"),
        ("a{x}", "neither a range"),
    ],
)
def test_bad_braces(pattern: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        expand_braces(pattern)


def test_the_first_match_decides_and_ranges_are_whole_numbers() -> None:
    rules = parse_rules({"llm.layers.{0..1}.*": 0.3, "llm.*": "keep second", "vision.*": "keep first"}, 2)
    book = RuleBook(rules)
    assert book.find("llm.layers.1.mlp") is rules[0]
    assert book.find("llm.layers.11.mlp") is rules[1]  # not layer 1
    assert book.find("vision.a.b.c") is rules[2]  # * spans dots
    assert book.find("other") is None
    assert book.find("xvision.a") is None  # the whole name must match


def test_actions() -> None:
    assert parse_rule("a", 0.25, 2).weights == (0.25, 0.75)
    assert parse_rule("a", [1, 2, 3], 3).weights == (1, 2, 3)
    keep = parse_rule("a", "keep third", 3)
    assert (keep.kind, keep.model) == ("keep", 2)
    assert parse_rule("a", "keep 2", 3).model == 1
    assert parse_rule("a", "keep base", 3).model == -1
    assert parse_rule("a", "overlap second", 2).kind == "overlap"
    assert parse_rule("a", "drop", 2).kind == "drop"
    rule = parse_rule("a", {"method": {"type": "ties", "density": 0.5}, "beta": 0.5}, 2)
    assert (rule.method, rule.weights) == (Ties(density=0.5), (0.5, 0.5))
    assert parse_rule("a", {"method": "slerp"}, 2).weights is None


@pytest.mark.parametrize(
    ("action", "models", "message"),
    [
        (0.5, 3, "one number is a beta between two models, but there are 3"),
        ([0.5], 2, "1 weights for 2 models"),
        (["a", "b"], 2, "weights must be finite numbers"),
        (True, 2, "weights must be finite numbers"),
        ("keep fist", 2, "'fist' names no model; there are first, second, base; did you mean 'first'"),
        ("keep third", 2, "'third' names no model"),
        ("frobnicate", 2, "expected a number"),
        ({"method": 3}, 2, "method must be a name"),
        ({"beta": 0.5, "weights": [1, 0]}, 2, "give beta or weights, not both"),
        ({"density": 0.5}, 2, "unknown 'density'; known are method, beta and weights"),
    ],
)
def test_actions_that_mean_nothing(action: Any, models: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_rule("pattern", action, models)


def test_every_bad_rule_is_listed() -> None:
    with pytest.raises(RecipeError, match=r"(?s)rule 'a'.*rule 'c'"):
        parse_rules({"a": "nonsense", "b": 0.5, "c": [1]}, 2)


def test_command_line_form() -> None:
    assert parse_assignment("vision.* = keep first") == ("vision.*", "keep first")
    assert parse_assignment("a=0.3") == ("a", 0.3)
    assert parse_assignment("a=0.3,0.7") == ("a", [0.3, 0.7])
    with pytest.raises(RecipeError, match="expected PATTERN=ACTION"):
        parse_assignment("vision.*")


def test_a_rule_that_matches_nothing_is_probably_misspelt() -> None:
    with pytest.raises(RecipeError, match=r"no tensor has a name like 'lm\.norm'; did you mean 'llm\.norm'"):
        RuleBook(parse_rules({"lm.norm": 0.5}, 2)).check(["llm.norm"])
