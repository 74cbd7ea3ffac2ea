from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sphinxkit.cli.score import score
from sphinxkit.errors import DataError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("score")(score)
    return app


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    annotations = [{"question_id": index, "image_path": "color/x.jpg", "gt_answers": "yes"} for index in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    (tmp_path / "p.jsonl").write_text(
        '{"question_id": 1, "answer": "yes"}\n{"question_id": 0, "answer": "It is yes"}\n'
    )
    return ["--annotations", str(tmp_path / "a.json"), "--predictions", str(tmp_path / "p.jsonl")]


def test_json_is_one_object(app: typer.Typer, files: list[str]) -> None:
    result = CliRunner().invoke(app, ["vsr_val", *files, "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["scores"] == {"accuracy": 0.5}
    assert report["count"] == 2
    assert report["unparsable"] == 0


def test_table(app: typer.Typer, files: list[str]) -> None:
    result = CliRunner().invoke(app, ["MME_benchmark", *files])
    assert result.exit_code == 0
    assert "MME_benchmark: 2 questions, metric mme" in result.stdout
    assert "categories.color" in result.stdout
    assert "50.0000" in result.stdout
    assert "200.0000" in result.stdout  # the lenient value
    assert "unparsable answers: 1" in result.stdout
    assert "note: category OCR is absent" in result.stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(("answers", "code"), [(["perhaps", "who knows"], 1), (["perhaps", "no"], 0)])
def test_no_answer_that_can_be_parsed_is_a_failure(
    app: typer.Typer, tmp_path: Path, answers: list[str], code: int, options: tuple[str, ...]
) -> None:
    annotations = [{"question_id": index, "image_path": "color/x.jpg", "gt_answers": "yes"} for index in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    (tmp_path / "p.json").write_text(json.dumps(answers))
    files = ["--annotations", str(tmp_path / "a.json"), "--predictions", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, ["MME_benchmark", *files, *options])
    assert result.exit_code == code
    assert "unparsable" in result.stdout  # the report is printed first


@pytest.mark.parametrize(
    ("answer", "gold", "code"),
    [("The answer is B", "B", 0), ("The answer is B", "C", 0), ("**B**", "B", 0), ("no", "B", 1)],
)
def test_an_answer_that_only_the_tolerant_parser_reads_is_none(
    app: typer.Typer, tmp_path: Path, answer: str, gold: str, code: int
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"question_id": 0, "image_path": "x.jpg", "gt_answers": gold}]))
    (tmp_path / "p.json").write_text(json.dumps([answer]))
    files = ["--annotations", str(tmp_path / "a.json"), "--predictions", str(tmp_path / "p.json"), "--json"]
    result = CliRunner().invoke(app, ["scienceqa_test_img", *files])
    assert result.exit_code == code
    report = json.loads(result.stdout)
    assert (report["unparsable"], report["lenient"]["accuracy"]) == (1, float(gold == "B" and code == 0))


def test_a_named_error_is_raised(app: typer.Typer, files: list[str]) -> None:
    result = CliRunner().invoke(app, ["vsr_vall", *files])
    assert isinstance(result.exception, DataError)
    assert "did you mean 'vsr_val'" in str(result.exception)
