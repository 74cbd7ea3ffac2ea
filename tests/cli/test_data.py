from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import DataError


def test_index(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    result = CliRunner().invoke(app, ["data", "index", str(path)], catch_exceptions=False)
    assert result.output.startswith(f"{path}: 2 records in 1 jsonl file, 0.")
    result = CliRunner().invoke(app, ["data", "index", str(path), "--json"], catch_exceptions=False)
    found = json.loads(result.output)
    assert (found["records"], found["format"]) == (2, "jsonl")
    assert found["file"] == sphinxkit.index_data(path).file


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"photo": "a.png"}\n')
    result = CliRunner().invoke(app, ["data", "index", str(path), "--column", "image=photo", "--json"])
    assert json.loads(result.output)["file"] == sphinxkit.index_data(path, columns={"image": "photo"}).file
    result = CliRunner().invoke(app, ["data", "index", str(path), "--column", "photo"])
    assert isinstance(result.exception, DataError)
    assert "--column 'photo': expected NAME=COLUMN" in str(result.exception)
