"""The name ``nano``, and commands without a checkpoint: the model that comes with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.hub import NANO, name_in_record

PLAIN = ("--device", "cpu", "--dtype", "float32")


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def announcement(golden: Path) -> str:
    count = sum(parameter.numel() for parameter in sphinxkit.load(golden / "llama_ens").parameters())
    return f"model: SPHINX-nano, {count / 1e6:.1f} M parameters"


def test_generate(embedded: Path, announcement: str, golden: Path) -> None:
    question = ("-p", "What is in the image?", "-i", str(golden / "images" / "wide.png"), "--max-new-tokens", "4")
    unnamed = invoke("generate", *question, *PLAIN, "--json")
    named = invoke("generate", str(embedded), *question, *PLAIN, "--json")
    assert unnamed.stdout == named.stdout
    assert announcement in unnamed.stderr
    assert "SPHINX-nano" not in named.stderr
    assert invoke("generate", "nano", *question, *PLAIN, "--json").stdout == named.stdout


@pytest.mark.usefixtures("embedded")
def test_chat(announcement: str) -> None:
    result = invoke("chat", "--max-new-tokens", "3", *PLAIN, stdin="What is it?\n/exit\n")
    assert announcement in result.stderr
    assert result.stdout.strip()


def test_a_file_of_prompts(embedded: Path, announcement: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "What?"}\n')
    files = ("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "3")
    first = invoke("generate", *files, *PLAIN)
    assert announcement in first.stderr
    assert first.stdout.startswith("1 rows answered, 0 were before")
    assert invoke("generate", *files, *PLAIN).stdout.startswith("0 rows answered, 1 were before")
    answer = json.loads((tmp_path / "out.jsonl").read_text())["text"]
    model = sphinxkit.load(embedded)
    assert answer.strip() == model.chat([{"role": "user", "content": "What?"}], max_new_tokens=3)


def test_other_weights_under_the_same_name_are_another_run(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_in_record("models/mine") == "models/mine"
    told = name_in_record(NANO)
    assert told.startswith("SPHINX-nano ")
    other = embedded.parent / "other"
    model = sphinxkit.load(embedded)
    model.llm.norm.weight.data.add_(1)
    model.save(other, overwrite=True)
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", other)
    assert name_in_record(NANO) != told


def test_commands_that_take_a_checkpoint_know_nano(embedded: Path, tmp_path: Path) -> None:
    found = json.loads(invoke("inspect", "nano", "--json").stdout)
    assert (found["name"], found["format"]) == ("nano", "sphinxkit")
    assert json.loads(invoke("memory", "nano", "--dtype", "float32", "--json").stdout)
    invoke("convert", "nano", "-o", str(tmp_path / "released"), "--to", "sphinx")
    assert json.loads(invoke("diff", "nano", str(tmp_path / "released"), "--json").stdout)["first"] == "nano"
    invoke(
        "mix",
        "nano",
        str(embedded),
        "--beta",
        "0.5",
        "--overlay",
        "-",
        "--overlay",
        "nano",
        "-o",
        str(tmp_path / "mix"),
    )
    invoke("convert", str(embedded), "-o", str(tmp_path / "laid"), "--overlay", "nano")
    with pytest.raises(DataError, match="holds no golden data"):
        invoke("verify", "nano")
    invoke("delta", "extract", "nano", str(embedded), "-o", str(tmp_path / "delta"))
    invoke("delta", "apply", "nano", str(tmp_path / "delta"), "-o", str(tmp_path / "restored"))
    (tmp_path / "in.jsonl").write_text('{"text": "red"}\n')
    shown = json.loads(invoke("inspect-data", str(tmp_path / "in.jsonl"), "--model", "nano", "--json").stdout)
    assert shown["samples"][0]["num_tokens"] > 1


@pytest.mark.parametrize("command", [("generate", "-p", "What?"), ("chat", "nano"), ("inspect", "nano")])
def test_an_installation_without_the_weights(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"comes without SPHINX-nano's weights \(missing: recipe.yaml, tokenizer"):
        invoke(*command)


def test_a_wrong_picture_costs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", tmp_path)
    with pytest.raises(DataError, match="there is no such file"):
        invoke("generate", "-p", "What?", "-i", "nowhere.png")


def test_module_of_the_package() -> None:
    found = [
        subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True).stdout
        for module in ("sphinxkit", "sphinxkit.cli")
    ]
    assert found == [f"sphinxkit {sphinxkit.__version__}\n"] * 2
