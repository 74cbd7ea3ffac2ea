from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphinxkit.cli import app

_spec = importlib.util.spec_from_file_location("mixing_models", Path(__file__).parents[1] / "mixing_models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    return models.language_model(tmp_path / "a", 0), models.language_model(tmp_path / "b", 1, layers=3)


def test_table_names_layers_and_what_is_not_shared(texts: tuple[Path, Path]) -> None:
    table = run("diff", *texts)
    assert "llm.layers.1" in table
    assert "only in the second: llm.layers.2.attention" in table
    assert "llm.layers.1.mlp.up_proj.weight" in run("diff", *texts, "--tensors")


def test_json_has_every_tensor(texts: tuple[Path, Path]) -> None:
    told = json.loads(run("diff", *texts, "--json"))
    a, b = (models.read_all(path) for path in texts)
    assert len(told["tensors"]) == len(a)
    norm = next(entry for entry in told["tensors"] if entry["name"] == "llm.norm.weight")
    assert norm["l2"] == pytest.approx((a["llm.norm.weight"] - b["llm.norm.weight"]).double().norm().item(), rel=1e-6)
    assert len(told["only_second"]) == 9
    assert json.loads(run("diff", texts[0], texts[0], "--json"))["total"]["l2"] == 0


def test_shapes_and_heat_map(texts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    wider = models.language_model(tmp_path / "wider", 2, vocab=44)
    table = run("diff", texts[0], wider, "--plot", tmp_path / "heat.png")
    assert "shapes differ: llm.embed_tokens.weight: [40, 16] and [44, 16]" in table
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
