from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sphinxkit.cli.inspect_data import inspect_data
from sphinxkit.errors import DataError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("inspect-data")(inspect_data)
    return app


@pytest.fixture
def tokenizer(golden: Path) -> str:
    return str(golden / "llama_ens5" / "tokenizer.model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is [it]?"}, {"from": "gpt", "value": "A red dog."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "task": "vqa", "conversations": turns}) + "\n")
    (tmp_path / "t.jsonl").write_text('{"text": "Once upon a time."}\n{"text": ""}\n')
    recipe = "kind: mixture\nsources: [{path: a.jsonl}, {path: t.jsonl, type: text}]\n"
    (tmp_path / "mixture.yaml").write_text(recipe)
    return tmp_path


def test_a_mixture_as_json(app: typer.Typer, folder: Path, tokenizer: str) -> None:
    arguments = [str(folder / "mixture.yaml"), "--folder", str(folder), "--tokenizer", tokenizer, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [(row["name"], row["count"]) for row in report["table"]] == [("a", 1), ("t", 2)]
    samples = {sample["id"]: sample for sample in report["samples"]}
    assert set(samples) == {"a:0", "t:0", "t:1"}
    pieces = samples["a:0"]["pieces"]
    assert [text for text, is_learnt in pieces if is_learnt] == [" A red dog.\n###"]
    assert "".join(text for text, _ in pieces).endswith("### Human: What is [it]?\n### Assistant: A red dog.\n###")
    assert samples["a:0"]["image"] == str(folder / "a.png")
    assert "".join(text for text, is_learnt in samples["t:0"]["pieces"] if is_learnt) == "Once upon a time."
    assert "'text' must be a text that is not empty" in samples["t:1"]["error"]


def test_a_file_in_colour(app: typer.Typer, folder: Path, tokenizer: str) -> None:
    arguments = [str(folder / "a.jsonl"), "--tokenizer", tokenizer, "-n", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "1 batches of 1" in result.stdout
    assert f"a:0  vqa  {folder}/a.png" in result.stdout
    assert "What is [it]?" in result.stdout
    assert "tokens, " in result.stdout
    coloured = CliRunner().invoke(app, arguments, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}, color=True)
    assert "\x1b[1;32m A red dog." in coloured.stdout


def test_text_files_bad_samples_and_other_recipes(app: typer.Typer, folder: Path, tokenizer: str) -> None:
    result = CliRunner().invoke(app, [str(folder / "t.jsonl"), "--tokenizer", tokenizer])
    assert "left out: " in result.stdout
    assert "no image" in result.stdout
    path = folder / "model.yaml"
    path.write_text((Path(__file__).parents[2] / "recipes" / "sphinx_13b.yaml").read_text())
    result = CliRunner().invoke(app, [str(path), "--tokenizer", tokenizer])
    assert isinstance(result.exception, DataError)
    assert "expected a recipe of kind mixture, got model" in str(result.exception)
