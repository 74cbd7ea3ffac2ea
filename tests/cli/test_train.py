from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.cli.train import _say, duration, override
from sphinxkit.errors import RecipeError
from sphinxkit.training import TrainResult

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_interrupted_says_so_in_its_exit_code(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    result = TrainResult("interrupted", 3, 10, Path("runs/a"), signal=number)
    monkeypatch.setattr("sphinxkit.training.train", lambda *_, **__: result)
    found = CliRunner().invoke(app, ["train", "finetune_7b"], catch_exceptions=False)
    assert found.exit_code == 128 + number
    assert "interrupted at step 3 of 10: runs/a" in found.stderr


def test_the_memory_of_a_stage() -> None:
    settings = ["--set", "model=sphinx_micro", "--set", "pack_tokens=2048", "--set", "tensor_parallel=2"]
    arguments = ["memory", "finetune_7b", "--processes", "4", "--text-tokens", "64", *settings]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "each of 4 processes, bfloat16, rows of 2048 tokens with 1 images, GiB" in result.stdout
    sizes = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert sizes["optimizer"] == 2 * sizes["gradients"] > 0
    assert sizes["total"] == sum(sizes[key] for key in ("weights", "gradients", "optimizer", "gathered", "activations"))
    assert sizes["row"] == {"tokens": 2048, "images": 1}
