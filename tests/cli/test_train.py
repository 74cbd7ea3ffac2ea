from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.cli.train import _say, duration, override
from sphinxkit.errors import RecipeError

LLM = {"type": "llama", "vocab_size": 512, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}


def test_overrides() -> None:
    document = {"lr": 1.0, "data": {"a": {"weight": 1}}, "lora": None}
    changed = override(document, ["lr=2e-5", "data.a.weight=3", "lora.rank=4", "train=[tags]", "init=a=b", "clip=null"])
    assert changed == {
        "lr": 2e-5,
        "data": {"a": {"weight": 3}},
        "lora": {"rank": 4},
        "train": ["tags"],
        "init": "a=b",
        "clip": None,
    }
    assert document["data"]["a"]["weight"] == 1
    for setting, message in (
        ("lr", "expected key=value"),
        ("=1", "expected key=value"),
        ("lr=[", "the value is not YAML"),
        ("lr.a=1", "lr has no keys below it"),
    ):
        with pytest.raises(RecipeError, match=message):
            override(document, [setting])
    assert duration(3723.4) == "1:02:03"


def test_the_progress_line_tells_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "step": 4,
        "num_steps": 10,
        "loss": 1.5,
        "losses": {"all": 1.5},
        "grad_norm": 0.25,
        "lr": 1e-3,
        "mfu": 0.125,
        "samples": 8,
        "seconds": 2.0,
        "tokens_per_second": 1234.5,
        "seconds_left": 61.0,
        "total": {"bad": 0, "too_long": 3, "truncated": 1200, "skipped_steps": 0},
    }
    _say(record)
    assert capsys.readouterr().err == (
        "step 5/10  loss 1.5000  norm 0.250  lr 1.00e-03  4.0 samples/s  1,234 tokens/s  MFU 12.5%"
        "  so far 3 too long, 1,200 cut to fit  0:01:01 left\n"
    )
    _say(record | {"total": {}, "mfu": None})
    assert "so far" not in capsys.readouterr().err


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "some words"}\n' * 4)
    tokenizer = Path(__file__).parents[2] / "recipes" / "sphinx_micro.model"
    document = {
        "kind": "train",
        "model": {"kind": "model", "llm": LLM},
        "tokenizer": str(tokenizer),
        "data": {"texts": {"mixture": {"sources": [{"path": "texts.jsonl", "type": "text"}]}, "batch_size": 2}},
        "train": ["llm"],
        "output": str(tmp_path / "run"),
        "dtype": "float32",
        "device": "cpu",
        "workers": 0,
    }
    recipe = tmp_path / "text.yaml"
    recipe.write_text(json.dumps(document))
    runner = CliRunner()
    arguments = ["train", str(recipe), "--set", f"data_root={tmp_path}", "--set", "epochs=2"]
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "step 4/4  loss" in result.stderr
    assert f"done at step 4 of 4: {tmp_path / 'run'}" in result.stderr
    assert (tmp_path / "run" / "model" / "recipe.yaml").exists()
    with pytest.raises(RecipeError, match="expected kind train, got kind model"):
        runner.invoke(app, ["train", "sphinx_7b"], catch_exceptions=False)
    again = runner.invoke(app, [*arguments, "--fresh"])
    assert "holds a run that stands at step 4" in str(again.exception)
