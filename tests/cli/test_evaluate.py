from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.errors import DataError


@pytest.fixture
def arguments(golden: Path, tmp_path: Path) -> list[str]:
    records = [
        {"image_path": f"data/{name}.png", "question": "Is it so?", "question_id": 0, "gt_answers": "no"}
        for name in ("wide", "missing")
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    return [
        *("evaluate", str(golden / "llama_ens"), "vsr_val", "--annotations", str(tmp_path / "a.json")),
        *("--images", str(golden / "images"), "--strip-prefix", "data/", "--batch-size", "2"),
        *("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "2"),
    ]


def test_evaluate(arguments: list[str], golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 1  # one question could not be asked
    assert "vsr_val: 2 questions, metric accuracy" in result.stdout
    assert "note: 1 of 2 questions could not be asked" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "vsr_val.predictions.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["0:0", "1:0"]
    assert lines[0]["finish_reason"] == "length"
    assert "missing.png" in lines[1]["error"]

    scored = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    report = json.loads(scored.stdout)
    assert report["scores"] == {"accuracy": 0.0}
    told = report["manifest"]["generation"]
    assert told["run"]["model"] == str(golden / "llama_ens")
    assert told["model"]["dtype"] == "float32"
    assert told["decoding"]["max_new_tokens"] == 2


def test_another_model_is_refused(arguments: list[str], golden: Path, tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "p.jsonl")]
    assert CliRunner().invoke(app, [*arguments, *output]).exit_code == 1
    arguments[1] = str(golden / "llama_ens_light")
    with pytest.raises(DataError, match=r"p\.jsonl was begun by another run: model\.weights was"):
        CliRunner().invoke(app, [*arguments, *output], catch_exceptions=False)


def test_an_unknown_benchmark_costs_no_model() -> None:
    arguments = ["evaluate", "nowhere", "vsr_vall", "--annotations", "a.json", "--images", "."]
    with pytest.raises(DataError, match="unknown benchmark 'vsr_vall'; did you mean 'vsr_val'"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
