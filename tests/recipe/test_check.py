"""A recipe from elsewhere can be looked at: nothing that it names is imported or called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import sphinxkit
from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.registry import no_imports

LOOKS = [sphinxkit.check, sphinxkit.inspect, sphinxkit.memory]
NUMBERS = {"vocab_size": 32, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "max_seq_len": 1024}

PLUGIN = """
from pathlib import Path
from sphinxkit.llama import LlamaModel
Path(__file__).with_suffix(".ran").touch()
def small(vocab_size: int = 32) -> LlamaModel:
    return LlamaModel(
        vocab_size=vocab_size, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, hidden_dim=16, max_seq_len=1024
    )
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file when it is imported."""
    path = tmp_path / "a_plugin_from_elsewhere.py"
    path.write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return path


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_called(tmp_path: Path, look: Callable[..., Any]) -> None:
    flag = tmp_path / "ran"
    document = {"kind": "model", "llm": {"type": "os:system", "command": f"touch {flag}"}}
    path = tmp_path / "evil.yaml"
    path.write_text(yaml.safe_dump(document))
    for recipe in (path, document):
        with pytest.raises(RecipeError, match=r"'os:system' is code to import; nothing of it was.*trust=True"):
            look(recipe)
    assert not flag.exists()


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_imported_without_trust(plugin: Path, look: Callable[..., Any]) -> None:
    document = {"kind": "model", "llm": f"{plugin.stem}:small_{look.__name__}"}
    plugin.write_text(PLUGIN.replace("small", f"small_{look.__name__}"))
    ran = plugin.with_suffix(".ran")
    with pytest.raises(RecipeError, match="code to import"):
        look(document)
    assert not ran.exists()
    assert look(document, trust=True) is not None
    assert ran.exists()
    assert look(Recipe(document)) is not None  # who made a Recipe has imported it already


def test_a_train_recipe_names_code(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    evil = {"type": "os:system", "command": f"touch {flag}"}
    plan = {"kind": "train", "model": {"kind": "model", "llm": evil}, "data": {"a": {"mixture": evil}}}
    with pytest.raises(RecipeError, match="code to import"):
        sphinxkit.check(plan)
    assert not flag.exists()


def test_shipped_recipes_need_no_trust() -> None:
    assert sphinxkit.check("sphinx_micro").kind == "model"
    assert sphinxkit.check({"kind": "model", "llm": {"type": "llama", **NUMBERS}}).num_parameters is not None


def test_imports_are_allowed_again_afterwards() -> None:
    with pytest.raises(RuntimeError, match="stop"), no_imports():
        raise RuntimeError("stop")
    with pytest.raises(RecipeError, match="lacks|unknown key|required"):
        Recipe({"kind": "model", "llm": {"type": "os:system", "other": os.devnull}})


def _stage(model: str = "sphinx_micro", **mixtures: Any) -> dict[str, Any]:
    data = {name: {"mixture": mixture, "batch_size": 1} for name, mixture in mixtures.items()}
    return {"kind": "train", "model": model, "data": data, "output": "run"}


WORLD = {"type": "sphinxkit.nano.world:WorldMixture", "sources": ["caption"]}


def test_the_model_of_a_stage_is_found() -> None:
    for model in ("nano", "sphinx_micro", "hf://org/repo"):
        assert sphinxkit.check(_stage(model, a=WORLD)).kind == "train"
    with pytest.raises(RecipeError, match="no recipe 'nanna'"):
        sphinxkit.check(_stage("nanna", a=WORLD))


def test_the_mixtures_of_a_stage_are_checked() -> None:
    assert sphinxkit.check(_stage(a=WORLD)).kind == "train"
    with pytest.raises(RecipeError) as error:
        sphinxkit.check(_stage(a={**WORLD, "seeed": 1}, b={"type": "os:system"}, c={"type": "tars"}))
    for told in (
        r"data.a.mixture.seeed: unknown key; did you mean 'seed'?",
        r"data.b.mixture.type: mixture 'os:system' is code to import; nothing of it was",
        r"data.c.mixture.type: unknown mixture 'tars'",
    ):
        assert told in str(error.value)


def test_the_mixtures_that_an_evaluation_names_are_checked() -> None:
    stage = _stage(a=WORLD)
    stage["evaluate"] = {"data": {"b": {"mixture": {**WORLD, "seeed": 1}, "batch_size": 1}}}
    with pytest.raises(RecipeError, match=r"evaluate\.data\.b\.mixture\.seeed: unknown key"):
        sphinxkit.check(stage)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", r"data\.a\.mixture: .*'nosuch'"),
        ("sphinx_micro", r"data\.a\.mixture: .*expected kind mixture, got kind model"),
    ],
)
def test_a_mixture_is_found_by_its_name(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sphinxkit.check(_stage(a=name))


def test_a_mixture_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("kind: mixture\nsources: [{path: a.jsonl, type: text}]\n")
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(_stage(a="own.yaml")))
    assert sphinxkit.check(tmp_path / "stage.yaml").kind == "train"
