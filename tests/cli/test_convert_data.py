from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sphinxkit.cli.convert_data import convert_data
from sphinxkit.errors import DataError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("convert-data")(convert_data)
    return app


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps({"1": {"question": "q", "imageId": 5, "answer": "a"}, "2": {}}, indent=0))
    return path


def test_to_stdout(app: typer.Typer, source: Path) -> None:
    result = CliRunner().invoke(app, [str(source), "--format", "gqa"])
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["image"] == "5.jpg"
    assert f"malformed: {source}:7: question 2: 'imageId' must be an integer or a text" in result.stderr
    assert "stdout: 1 conversations, 1 malformed records left out" in result.stderr


def test_to_a_file_with_a_json_report(app: typer.Typer, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    result = CliRunner().invoke(app, [str(source), "--format", "gqa", "--task", "vqa", "-o", str(output), "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["num_written"], report["num_malformed"], report["output"]) == (1, 1, str(output))
    assert len(output.read_text().splitlines()) == 1


def test_options_reach_the_converter(app: typer.Typer, tmp_path: Path) -> None:
    content = {str(i): {"imageURL": "x.png", "questions": ["q"], "answers": ["a"], "split": i} for i in (1, 2)}
    (tmp_path / "d.json").write_text(json.dumps(content))
    arguments = [
        str(tmp_path / "d.json"),
        "--format",
        "ocrvqa",
        "--split",
        "val",
        "--image-prefix",
        "i/",
        "--limit",
        "5",
    ]
    result = CliRunner().invoke(app, arguments)
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == ["i/2.png"]


def test_strict_and_wrong_usage(app: typer.Typer, source: Path) -> None:
    result = CliRunner().invoke(app, [str(source), "--format", "gqa", "--strict"])
    assert isinstance(result.exception, DataError)
    assert "gqa.json:7: question 2: 'imageId'" in str(result.exception)
    assert CliRunner().invoke(app, [str(source), "--format", "gqa", "--json"]).exit_code == 2


def test_many_malformed_records_are_summed_up(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({str(index): 1 for index in range(105)}))
    result = CliRunner().invoke(app, [str(tmp_path / "m.json"), "--format", "gqa", "-o", str(tmp_path / "o.jsonl")])
    assert f"malformed: 5 more, all of them in {tmp_path}/o.jsonl.malformed.jsonl" in result.stderr
    assert "0 conversations, 105 malformed records left out" in result.stdout
