from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.errors import DataError, RecipeError
from sphinxkit.interpolation import MixPlan
from sphinxkit.sphinx_model import SphinxModel

_spec = importlib.util.spec_from_file_location("mixing_models", Path(__file__).parents[1] / "mixing_models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

HEAD = "llm.lm_head.weight"
NORM = "llm.norm.weight"


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    return models.language_model(tmp_path / "a", 0), models.language_model(tmp_path / "b", 1)


def test_a_list_of_models(texts: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = sphinxkit.mix(
        texts,
        tmp_path / "out",
        beta=0.25,
        rules={NORM: "keep second"},
        dtype=torch.bfloat16,
        progress=lambda *facts: told.append(facts),
    )
    a, b, mixed = (models.read_all(path) for path in (*texts, tmp_path / "out"))
    assert torch.equal(mixed[HEAD], (0.25 * a[HEAD] + 0.75 * b[HEAD]).bfloat16())
    assert torch.equal(mixed[NORM], b[NORM].bfloat16())
    assert (result.path, result.method, result.weights) == (tmp_path / "out", "linear", (0.25, 0.75))
    assert (result.models, result.num_tensors) == (tuple(map(str, texts)), len(a))
    assert {total for _, _, total in told} == {sum(size for _, size, _ in told)}
    assert (result.sweep, result.soup, result.plot) == (None, None, None)


def test_every_form_of_a_recipe(texts: tuple[Path, Path], tmp_path: Path) -> None:
    document: dict[str, Any] = {"kind": "mix", "models": ["a", "b"], "beta": 0.25, "rules": {NORM: "keep second"}}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(document))
    forms = [file, str(file), document | {"models": [*map(str, texts)]}]
    forms.append(MixPlan([*map(str, texts)], beta=0.25, rules={NORM: "keep second"}))
    results = []
    for index, form in enumerate(forms):
        sphinxkit.mix(form, tmp_path / f"out{index}")
        results.append(models.read_all(tmp_path / f"out{index}"))
    a, b = (models.read_all(path) for path in texts)
    for mixed in results:
        assert torch.equal(mixed[HEAD], 0.25 * a[HEAD] + 0.75 * b[HEAD])
        assert torch.equal(mixed[NORM], b[NORM])
    sphinxkit.mix(file, tmp_path / "turned", models=texts[::-1], weights=[0, 1], rules={NORM: "keep first"})
    turned = models.read_all(tmp_path / "turned")  # the rule given stands before the recipe's
    assert torch.equal(turned[HEAD], a[HEAD])
    assert torch.equal(turned[NORM], b[NORM])


def test_a_method_with_options(texts: tuple[Path, Path], tmp_path: Path) -> None:
    base = models.language_model(tmp_path / "base", 3)
    method = {"type": "ties", "density": 0.5}
    result = sphinxkit.mix(texts, tmp_path / "out", method=method, base=base)
    first, a, b = (models.read_all(path)[HEAD] for path in (base, *texts))
    expected = sphinxkit.interpolation.ties(first, (a, b), density=0.5)
    assert torch.equal(models.read_all(tmp_path / "out")[HEAD], expected)
    assert (result.method, result.weights) == (method, (1.0, 1.0))


def closeness(model: SphinxModel) -> float:
    return float(model.llm.norm.weight.detach().mean())


def test_a_sweep_by_a_function(texts: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    a, b = (models.read_all(path)[NORM].mean().item() for path in texts)
    result = sphinxkit.mix(
        texts,
        tmp_path / "best",
        sweep=[0.0, 0.5, 1.0],
        score=lambda model: -abs(closeness(model) - (a + b) / 2),
        report=lambda name, value: told.append((name, value)),
    )
    assert result.sweep is not None
    assert result.sweep.best.beta == 0.5
    assert result.weights == (0.5, 0.5)
    assert [name for name, _ in told] == ["beta 0", "beta 0.5", "beta 1"]
    said = json.loads((tmp_path / "best" / "provenance.json").read_text())
    assert said["sweep"]["score"].endswith("<lambda>")
    without = sphinxkit.mix(texts, sweep="0:1:1", score=closeness, minimize=True)
    assert (without.path, without.plot) == (None, None)
    assert without.weights == ((1.0, 0.0) if a < b else (0.0, 1.0))


def test_a_greedy_soup_by_a_function(texts: tuple[Path, Path], tmp_path: Path) -> None:
    result = sphinxkit.mix(texts, tmp_path / "out", method="greedy_soup", score=closeness)
    means = [models.read_all(path)[NORM].mean().item() for path in texts]
    best = means.index(max(means))
    assert result.soup is not None
    assert result.soup.members == (str(texts[best]),)  # the mean of both is lower than the higher of the two
    assert result.soup.score == pytest.approx(max(means))
    assert result.to_dict()["soup"]["members"] == [str(texts[best])]


def test_a_score_may_generate_text(golden: Path, tmp_path: Path) -> None:
    """The model in memory answers with the weights of each beta, although what speeds it up was made for the first."""
    pair = (golden / "llama_ens5", models.perturbed(golden / "llama_ens5", tmp_path / "other", seed=4))
    question, image = "What is in the image?", golden / "images" / "wide.png"
    answers: list[list[int]] = []

    def score(model: SphinxModel) -> float:
        answers.append(model.generate(question, image, max_new_tokens=4)[0].token_ids)
        return 0.0

    sphinxkit.mix(pair, sweep=[1.0, 0.0], score=score)
    plain = [sphinxkit.load(path, accelerate=None) for path in pair]
    assert answers == [model.generate(question, image, max_new_tokens=4)[0].token_ids for model in plain]
    assert answers[0] != answers[1]


def test_bad_calls(texts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name the models to mix"):
        sphinxkit.mix([], tmp_path / "out")
    with pytest.raises(RecipeError, match="expected kind mix, got kind model"):
        sphinxkit.mix("sphinx_micro", tmp_path / "out")
    with pytest.raises(DataError, match="say where the mix should go"):
        sphinxkit.mix(texts, beta=0.5)
    with pytest.raises(DataError, match="score= needs one of them"):
        sphinxkit.mix(texts, tmp_path / "out", beta=0.5, score=closeness)
    with pytest.raises(DataError, match="linear needs a beta"):
        sphinxkit.mix(texts, sweep=[], score=closeness)
    with pytest.raises(RecipeError, match="dtype: expected one of float32"):
        sphinxkit.mix(texts, tmp_path / "out", beta=0.5, dtype=torch.int8)
    assert not (tmp_path / "out").exists()
