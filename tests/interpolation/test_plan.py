from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sphinxkit.errors import RecipeError
from sphinxkit.interpolation import MixPlan
from sphinxkit.registry import Registry


def test_what_a_recipe_says() -> None:
    plan = MixPlan(["a", "b"], method={"type": "ties", "density": 0.5}, beta=0.3, rules={"vision.*": "keep first"})
    assert plan.mix_weights() == (0.3, 0.7)
    assert plan.mix_method().name == "ties"
    assert plan.mix_rules()[0].kind == "keep"
    assert MixPlan(["a", "b", "c"], weights=[1, 1, 1]).mix_weights() == [1, 1, 1]
    assert MixPlan(["a", "b"], method="uniform_soup").mix_weights() is None
    assert MixPlan(["a"]).mix_method().name == "linear"


def test_unknown_methods_and_options() -> None:
    with pytest.raises(RecipeError, match="method: unknown mixing method 'linaer'; did you mean 'linear'"):
        MixPlan(["a", "b"], method="linaer")
    with pytest.raises(RecipeError, match="method: mixing method 'ties': .*densty"):
        MixPlan(["a", "b"], method={"type": "ties", "densty": 1})
    with pytest.raises(RecipeError, match=r"method: density must be in \(0, 1\], got 'much'"):
        MixPlan(["a", "b"], method={"type": "ties", "density": "much"})
    for method, message in (
        ({"type": "ties", "scale": "x"}, "method: scale must be a finite number, got 'x'"),
        ({"type": "dare", "seed": 1.5}, "method: seed must be a whole number, got 1.5"),
    ):
        with pytest.raises(RecipeError, match=message):
            MixPlan(["a", "b"], method=method)
    rules = {"a.*": {"method": "tis"}, "b.*": {"method": {"type": "dare", "drop_rate": 1}}}
    with pytest.raises(RecipeError, match=r"(?s)rules: rule 'a.\*': unknown.*rules: rule 'b.\*': drop_rate must be"):
        MixPlan(["a", "b"], rules=rules)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": []}, "models: name at least one"),
        ({"models": ["a", "b"], "beta": 0.5, "weights": [1, 1]}, "beta, weights: give one of them"),
        ({"models": ["a", "b", "c"], "beta": 0.5}, "beta: is between two models, but there are 3"),
        ({"models": ["a", "b"], "dtype": "int8"}, "dtype: expected one of float32"),
        ({"models": ["a", "b"], "method": {"density": 1}}, "method: expected a name"),
        ({"models": ["a", "b"], "rules": {"x": "what", "y": "so"}}, r"(?s)rules: rule 'x'.*rules: rule 'y'"),
    ],
)
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MixPlan(**fields)


def test_paths_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plan = MixPlan(["a", "elsewhere"], base="a").relative_to(tmp_path)
    assert plan.models == [str(tmp_path / "a"), "elsewhere"]
    assert plan.base == str(tmp_path / "a")


def test_a_schema_can_be_made_from_it() -> None:
    fields = Registry("recipe", {"mix": MixPlan}).options_model("mix").model_fields
    assert {"models", "method", "beta", "weights", "rules", "base", "format"} <= set(fields)
