from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.errors import RecipeError
from sphinxkit.training import TrainResult

LLM = {"type": "llama", "vocab_size": 512, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}


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
        "num_workers": 0,
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
    assert "holds a run at step 4" in str(again.exception)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_interrupted_says_so_in_its_exit_code(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    result = TrainResult("interrupted", 3, 10, Path("runs/a"), signal=number)
    monkeypatch.setattr("sphinxkit.train", lambda *_, **__: result)
    found = CliRunner().invoke(app, ["train", "finetune_7b"], catch_exceptions=False)
    assert found.exit_code == 128 + number


def test_the_memory_of_a_stage() -> None:
    settings = ["--set", "model=sphinx_micro", "--set", "pack_tokens=2048", "--set", "tensor_parallel=2"]
    arguments = ["memory", "finetune_7b", "--processes", "4", "--text-tokens", "64", *settings]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "each of 4 processes, bfloat16, rows of 2048 tokens with 1 images, GiB" in result.stdout
    sizes = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert sizes["optimizer"] == 2 * sizes["gradients"] > 0
    assert sizes["total"] == sum(sizes[key] for key in ("weights", "gradients", "optimizer", "gathered", "activations"))
    assert sizes["row"] == {"tokens": 2048, "images": 1}
