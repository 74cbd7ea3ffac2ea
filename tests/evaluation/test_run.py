"""``evaluate``: files that a killed run resumes, and scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.batch_inference import fingerprint
from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, metrics
from sphinxkit.evaluation.inputs import manifest_path
from sphinxkit.sphinx_model import SphinxModel

NAME = "gqa_testdev_balanced"


def test_answers_are_written_and_scored(files: Any) -> None:
    seen: list[tuple[int, int]] = []
    model = files.model()
    report = files.evaluate(model, progress=lambda *n: seen.append(n), run_facts={"model": "m"})
    assert report.scores == {"accuracy": 1.0}
    assert report.count == 7
    assert model.calls == [2, 2, 2, 1]
    assert seen == [(done, 7) for done in range(1, 8)]
    assert files.lines()[6] == {"key": "6:-1", "question_id": -1, "answer": "16", "finish_reason": "stop"}
    told = report.manifest["generation"]
    assert (told["benchmark"], told["task"], told["template"]) == (NAME, "vqa", "sphinx_v1")
    assert told["model"] == fingerprint(model)
    assert told["decoding"] == {"method": "greedy", "max_new_tokens": 10, "stop": ["\n###"]}
    assert told["prompts"]["first"].endswith("q0\nAnswer the question using a single word or phrase.\n### Assistant:")
    assert told["run"]["model"] == "m"
    assert told["run"]["versions"]["sphinxkit"] == sphinxkit.__version__
    assert (told["finish_reasons"], told["errors"]) == ({"stop": 7}, 0)
    assert benchmarks.score(NAME, files.annotations, files.output).scores == report.scores


@pytest.mark.parametrize("cut", [0, 9])
def test_a_killed_run_is_resumed(files: Any, cut: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        files.evaluate(files.model(limit=2))
    assert len(files.lines()) == 4  # each batch was on disk before the next was asked
    if cut:
        files.output.write_bytes(files.output.read_bytes()[:-cut])  # killed while it wrote
    model = files.model()
    assert files.evaluate(model).scores == {"accuracy": 1.0}
    assert model.asked == (4 if cut else 3)
    again = files.model()
    whole = files.output.read_bytes()
    assert files.evaluate(again).scores == {"accuracy": 1.0}
    assert again.asked == 0
    assert files.output.read_bytes() == whole


def test_a_bad_image_is_told_in_its_place_and_asked_again(files: Any) -> None:
    good = (files.folder / "2.png").read_bytes()
    (files.folder / "2.png").write_bytes(good[:40])
    (files.folder / "5.png").unlink()
    report = files.evaluate(files.model(), batch_size=4)
    assert [line["answer"] for line in files.lines()] == ["10", "11", "", "13", "14", "", "16"]
    assert [line["key"] for line in files.lines() if "error" in line] == ["2:-1", "5:-1"]
    assert files.lines()[2]["finish_reason"] == "error"
    assert report.scores == {"accuracy": pytest.approx(5 / 7)}
    assert report.manifest["generation"]["errors"] == 2
    assert "2 of 7 questions could not be asked and count as empty answers; the first is 2:-1: " in report.notes[-1]
    (files.folder / "2.png").write_bytes(good)
    model = files.model()
    report = files.evaluate(model)
    assert model.asked == 2  # question 5 still has no image
    assert report.scores == {"accuracy": pytest.approx(6 / 7)}
    assert [line["key"] for line in files.lines()] == [f"{i}:-1" for i in range(7)]  # in order again


def test_a_prompt_that_the_model_refuses_costs_no_neighbour(files: Any) -> None:
    files.records[3]["question"] = "long"
    files.write()
    report = files.evaluate(files.model(), batch_size=4)
    assert [line["answer"] for line in files.lines()] == ["10", "11", "12", "", "14", "15", "16"]
    assert files.lines()[3]["error"] == "prompt 0 has too many tokens"
    assert report.scores == {"accuracy": pytest.approx(6 / 7)}


def test_questions_without_images(files: Any) -> None:
    files.records[0] |= {"image_path": "", "gt_answers": "0"}
    files.write()
    assert files.evaluate(files.model()).scores == {"accuracy": 1.0}


def test_questions_without_their_images(files: Any) -> None:
    model = files.model()
    report = files.evaluate(model, withhold_images=True)
    assert [line["answer"] for line in files.lines()] == ["0"] * 7
    assert report.scores == {"accuracy": 0.0}
    assert report.manifest["generation"]["withhold_images"] is True


def test_answers_in_another_order_end_in_the_annotations_order(files: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        files.evaluate(files.model(backwards=True, limit=2))
    assert [line["key"] for line in files.lines()] == ["1:-1", "0:-1", "3:-1", "2:-1"]
    assert files.evaluate(files.model(backwards=True)).scores == {"accuracy": 1.0}
    assert [line["key"] for line in files.lines()] == [f"{i}:-1" for i in range(7)]


def test_a_checkpoint_is_loaded_and_the_output_has_a_default(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"image_path": "wide.png", "question": "?", "gt_answers": "no"}]))
    report = sphinxkit.evaluate(golden / "llama_ens", "vsr_val", "a.json", golden / "images", max_new_tokens=2)
    told = report.manifest["generation"]
    assert (told["run"]["model"], told["model"]["dtype"]) == (str(golden / "llama_ens"), "float32")
    assert sphinxkit.score("vsr_val", "a.json", "vsr_val.predictions.jsonl").scores == report.scores


def test_another_runs_answers_are_not_resumed(files: Any) -> None:
    files.evaluate(files.model())
    with pytest.raises(DataError, match=r"p\.jsonl was begun by another run: model\.weights was '.*', now '.*'\. Name"):
        files.evaluate(files.model(weight=2.0))
    with pytest.raises(DataError, match=r"model\.dtype was 'float32', now 'bfloat16'"):
        files.evaluate(files.model(dtype=torch.bfloat16))
    with pytest.raises(DataError, match=r"withhold_images was None, now True"):
        files.evaluate(files.model(), withhold_images=True)
    with pytest.raises(DataError, match=r"decoding\.max_new_tokens was 10, now 3"):
        files.evaluate(files.model(), max_new_tokens=3)
    with pytest.raises(DataError, match=r"benchmark was 'gqa_testdev_balanced', now 'vsr_val'; task was 'vqa', now ''"):
        files.evaluate(files.model(), benchmark="vsr_val")
    files.records[2]["gt_answers"] = "another"
    files.write()
    with pytest.raises(DataError, match=r"another run: annotations\.sha256 was '.*', now '[0-9a-f]*'\. Name"):
        files.evaluate(files.model())
    files.output.unlink()
    assert files.evaluate(files.model()).scores == {"accuracy": pytest.approx(6 / 7)}
    manifest_path(files.output).write_text("{")
    with pytest.raises(DataError, match=r"p\.jsonl\.manifest\.json: the manifest cannot be read"):
        files.evaluate(files.model())
    manifest_path(files.output).unlink()
    with pytest.raises(DataError, match=r"exists, but p\.jsonl\.manifest\.json does not: it is unknown"):
        files.evaluate(files.model())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not JSON", r"p\.jsonl:8: not a line of this run"),
        ("[1]", r"p\.jsonl:8: not a line of this run"),
        ('{"key": "x:-1", "answer": ""}', r"p\.jsonl:8: not a line of this run"),
        ('{"key": "9:-1", "answer": ""}', r"p\.jsonl:8: key '9:-1' is unknown or there twice"),
        ('{"key": "1:-1", "answer": ""}', r"p\.jsonl:8: key '1:-1' is unknown or there twice"),
    ],
)
def test_a_damaged_file_is_refused(files: Any, line: str, message: str) -> None:
    files.evaluate(files.model())
    with files.output.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        files.evaluate(files.model())


def test_gold_answers_are_checked_before_anything_is_asked(files: Any) -> None:
    model = files.model()
    files.records[6]["gt_answers"] = {"a": 1}
    files.write()
    with pytest.raises(DataError, match=r"gt_answers must be text or a list of texts"):
        files.evaluate(model)
    assert model.calls == []
    assert not files.output.exists()


@pytest.fixture(scope="module")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


def test_describe_tells_models_apart(model: SphinxModel, golden: Path) -> None:
    facts = fingerprint(model)
    assert facts == fingerprint(model)
    assert facts["dtype"] == "float32"
    half = fingerprint(sphinxkit.load(golden / "llama_ens", dtype=torch.bfloat16))
    assert {key for key in facts if facts[key] != half[key]} == {"weights", "dtype"}
    last = model.llm.norm.weight
    before = last[-1].item()
    with torch.no_grad():
        last[-1] += 1
        changed = fingerprint(model)
        last[-1] = before
    assert {key for key in facts if facts[key] != changed[key]} == {"weights"}


def test_a_real_model_answers_as_it_does_by_hand(model: SphinxModel, golden: Path, tmp_path: Path) -> None:
    records = [
        {
            "image_path": f"{name}.png",
            "question": name,
            "question_id": "height9_width9",
            "gt_answers": [0, 0, 9, 9],
        }
        for name in ("wide", "tall", "square")
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    report = sphinxkit.evaluate(
        model,
        "refcoco_val",
        tmp_path / "a.json",
        golden / "images",
        tmp_path / "p.jsonl",
        batch_size=2,
        max_new_tokens=3,
    )
    assert set(report.scores) == set(metrics.score("precision_at_1", []).scores)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for row, record in zip(rows, records, strict=True):
        asked = "Please provide the bounding box coordinate of the region this sentence describes: {}."
        messages = [{"role": "user", "content": asked.format(record["question"])}]
        image = golden / "images" / str(record["image_path"])
        assert row["answer"] == model.chat(messages, image, max_new_tokens=3)


def test_an_output_that_cannot_be_read_again(files: Any) -> None:
    files.output.parent.mkdir()
    os.mkfifo(files.output)
    with pytest.raises(DataError, match=r"p\.jsonl: is no regular file; the answers are read from it again"):
        files.evaluate(files.model())


def test_an_output_that_cannot_be_written_is_named(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(DataError, match=r"p\.jsonl: cannot be written: .*No space left on device"):
        files.evaluate(files.model())
