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


def test_the_model_of_a_stage_is_found(tmp_path: Path) -> None:
    document = {"kind": "train", "output": "run", "steps": 1, "data": {"text": {"mixture": "a.yaml", "batch_size": 1}}}
    for model in ("nano", "sphinx_micro", "hf://org/repo"):
        assert sphinxkit.check(document | {"model": model}).kind == "train"
    with pytest.raises(RecipeError, match="no recipe 'nanna'"):
        sphinxkit.check(document | {"model": "nanna"})
