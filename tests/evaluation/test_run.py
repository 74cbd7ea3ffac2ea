from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sphinxkit
from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, metrics, read_annotations, run
from sphinxkit.evaluation.inputs import manifest_path
from sphinxkit.formatters import ConversationTemplate, sphinx_v1
from sphinxkit.generation import Generation
from sphinxkit.sphinx_model import SphinxModel

NAME = "gqa_testdev_balanced"
FACTS = {"weights": "abc"}


@dataclass
class Eyes:
    """Answers with the image's width; is killed after some calls; refuses a prompt with the word "long"."""

    conversation: ConversationTemplate | None = field(default_factory=sphinx_v1)
    tokenizer: object = "a tokenizer"
    vision: object = "a tower"
    calls: list[int] = field(default_factory=list)
    limit: int = 100

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None],
        *,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[str],
    ) -> list[Generation]:
        if len(self.calls) >= self.limit:
            raise KeyboardInterrupt
        if any("long" in prompt for prompt in prompts):
            raise DataError("prompt 0 has too many tokens")
        assert (temperature, stop) == (0.0, ("\n###",))
        self.calls.append(len(prompts))
        return [Generation(f" {0 if image is None else image.width}\n", [1], "stop") for image in images]

    @property
    def asked(self) -> int:
        return sum(self.calls)


@dataclass
class Files:
    """Seven questions (the ids repeat), each about an image as wide as its index plus ten; every answer is right."""

    folder: Path

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = [
            {"image_path": f"{i}.png", "question": f"q{i}", "question_id": -1, "gt_answers": str(i + 10)}
            for i in range(7)
        ]
        for index in range(7):
            Image.new("RGB", (index + 10, 4)).save(self.folder / f"{index}.png")
        self.write()

    annotations = property(lambda self: self.folder / "a.json")
    output = property(lambda self: self.folder / "out" / "p.jsonl")

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.records))

    def evaluate(self, model: Eyes, **options: Any) -> benchmarks.Report:
        options = {"model_facts": FACTS, "batch_size": 2} | options
        name = options.pop("benchmark", NAME)
        return run.evaluate(model, name, self.annotations, self.folder, self.output, **options)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_answers_are_written_and_scored(files: Files) -> None:
    seen: list[tuple[int, int]] = []
    model = Eyes()
    report = files.evaluate(model, progress=lambda *n: seen.append(n), run_facts={"model": "m"})
    assert report.scores == {"accuracy": 1.0}
    assert report.count == 7
    assert model.calls == [2, 2, 2, 1]
    assert seen == [(done, 7) for done in range(1, 8)]
    assert files.lines()[6] == {"key": "6:-1", "question_id": -1, "answer": "16", "finish_reason": "stop"}
    told = report.manifest["generation"]
    assert (told["benchmark"], told["task"], told["template"], told["model"]) == (NAME, "vqa", "sphinx_v1", FACTS)
    assert told["decoding"] == {"method": "greedy", "max_new_tokens": 10, "stop": ["\n###"]}
    assert told["prompts"]["first"].endswith("q0\nAnswer the question using a single word or phrase.\n### Assistant:")
    assert told["run"]["model"] == "m"
    assert told["run"]["versions"]["sphinxkit"] == sphinxkit.__version__
    assert (told["finish_reasons"], told["errors"]) == ({"stop": 7}, 0)
    assert benchmarks.score(NAME, files.annotations, files.output).scores == report.scores


@pytest.mark.parametrize("cut", [0, 9])
def test_a_killed_run_goes_on(files: Files, cut: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        files.evaluate(Eyes(limit=2))
    assert len(files.lines()) == 4  # each batch was on disk before the next was asked
    if cut:
        files.output.write_bytes(files.output.read_bytes()[:-cut])  # killed while it wrote
    model = Eyes()
    assert files.evaluate(model).scores == {"accuracy": 1.0}
    assert model.asked == (4 if cut else 3)
    again = Eyes()
    whole = files.output.read_bytes()
    assert files.evaluate(again).scores == {"accuracy": 1.0}
    assert again.asked == 0
    assert files.output.read_bytes() == whole


def test_a_bad_image_is_told_in_its_place_and_asked_again(files: Files) -> None:
    good = (files.folder / "2.png").read_bytes()
    (files.folder / "2.png").write_bytes(good[:40])
    (files.folder / "5.png").unlink()
    report = files.evaluate(Eyes(), batch_size=4)
    assert [line["answer"] for line in files.lines()] == ["10", "11", "", "13", "14", "", "16"]
    assert [line["key"] for line in files.lines() if "error" in line] == ["2:-1", "5:-1"]
    assert files.lines()[2]["finish_reason"] == "error"
    assert report.scores == {"accuracy": pytest.approx(5 / 7)}
    assert report.manifest["generation"]["errors"] == 2
    assert "2 of 7 questions could not be asked and count as empty answers; the first is 2:-1: " in report.notes[-1]
    (files.folder / "2.png").write_bytes(good)
    model = Eyes()
    report = files.evaluate(model)
    assert model.asked == 1
    assert report.scores == {"accuracy": pytest.approx(6 / 7)}
    assert [line["key"] for line in files.lines()] == [f"{i}:-1" for i in range(7)]  # in order again


def test_a_prompt_that_the_model_refuses_costs_no_neighbour(files: Files) -> None:
    files.records[3]["question"] = "long"
    files.write()
    report = files.evaluate(Eyes(), batch_size=4)
    assert [line["answer"] for line in files.lines()] == ["10", "11", "12", "", "14", "15", "16"]
    assert files.lines()[3]["error"] == "prompt 0 has too many tokens"
    assert report.scores == {"accuracy": pytest.approx(6 / 7)}


def test_questions_without_images(files: Files) -> None:
    files.records[0] |= {"image_path": "", "gt_answers": "0"}
    files.write()
    assert files.evaluate(Eyes()).scores == {"accuracy": 1.0}


def test_another_runs_answers_are_not_gone_on_with(files: Files) -> None:
    files.evaluate(Eyes())
    with pytest.raises(DataError, match=r"p\.jsonl was begun by another run: model\.weights was 'abc', now 'x'\. Name"):
        files.evaluate(Eyes(), model_facts={"weights": "x"})
    with pytest.raises(DataError, match=r"model\.dtype was None, now 'float32'"):
        files.evaluate(Eyes(), model_facts={**FACTS, "dtype": "float32"})
    with pytest.raises(DataError, match=r"decoding\.max_new_tokens was 10, now 3"):
        files.evaluate(Eyes(), max_new_tokens=3)
    with pytest.raises(DataError, match=r"benchmark was 'gqa_testdev_balanced', now 'vsr_val'; task was 'vqa', now ''"):
        files.evaluate(Eyes(), benchmark="vsr_val")
    files.records[2]["gt_answers"] = "another"
    files.write()
    with pytest.raises(DataError, match=r"another run: annotations\.sha256 was '.*', now '[0-9a-f]*'\. Name"):
        files.evaluate(Eyes())
    files.output.unlink()
    assert files.evaluate(Eyes()).scores == {"accuracy": pytest.approx(6 / 7)}
    manifest_path(files.output).write_text("{")
    with pytest.raises(DataError, match=r"p\.jsonl\.manifest\.json: the manifest cannot be read"):
        files.evaluate(Eyes())
    manifest_path(files.output).unlink()
    with pytest.raises(DataError, match=r"exists, but p\.jsonl\.manifest\.json does not: nobody knows"):
        files.evaluate(Eyes())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not JSON", r"p\.jsonl:8: not a line of this run's"),
        ("[1]", r"p\.jsonl:8: not a line of this run's"),
        ('{"key": "x:-1", "answer": ""}', r"p\.jsonl:8: not a line of this run's"),
        ('{"key": "9:-1", "answer": ""}', r"p\.jsonl:8: key '9:-1' is unknown or there twice"),
        ('{"key": "1:-1", "answer": ""}', r"p\.jsonl:8: key '1:-1' is unknown or there twice"),
    ],
)
def test_a_damaged_file_is_refused(files: Files, line: str, message: str) -> None:
    files.evaluate(Eyes())
    with files.output.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        files.evaluate(Eyes())


def test_gold_answers_are_checked_before_anything_is_asked(files: Files) -> None:
    model = Eyes()
    files.records[6]["gt_answers"] = {"a": 1}
    files.write()
    with pytest.raises(DataError, match=r"gt_answers must be text or a list of texts"):
        files.evaluate(model)
    assert model.calls == []
    assert not files.output.exists()


def test_predict_writes_nothing(files: Files) -> None:
    before = sorted(files.folder.rglob("*"))
    from_file = list(run.predict(Eyes(), NAME, files.annotations, files.folder))
    read = read_annotations(files.annotations)
    from_list = list(run.predict(Eyes(), benchmarks.get(NAME), read, files.folder, batch_size=3))
    assert [answer.answer for answer in from_file] == [str(i + 10) for i in range(7)]
    assert from_list == from_file
    assert sorted(files.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"conversation": None}, "this model has no conversation template"),
        ({"tokenizer": None}, "this model has no tokenizer: it cannot be asked"),
        ({"vision": None}, "this model has no vision tower, but the questions are about images"),
    ],
)
def test_a_model_that_cannot_be_asked(files: Files, fault: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(run.predict(Eyes(**fault), NAME, files.annotations, files.folder))


def test_faults(files: Files) -> None:
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        list(run.predict(Eyes(), NAME, files.annotations, files.folder, batch_size=0))
    with pytest.raises(DataError, match=r"holds none of the 7 images"):
        list(run.predict(Eyes(), NAME, files.annotations, files.folder / "elsewhere"))
    with pytest.raises(DataError, match=r"unknown benchmark 'nothing'"):
        files.evaluate(Eyes(), benchmark="nothing")


@pytest.fixture(scope="module")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


def test_describe_tells_models_apart(model: SphinxModel, golden: Path) -> None:
    facts = run.describe(model)
    assert facts == run.describe(model)
    assert facts["dtype"] == "float32"
    half = run.describe(sphinxkit.load(golden / "llama_ens", dtype=torch.bfloat16))
    assert {key for key in facts if facts[key] != half[key]} == {"weights", "dtype"}
    last = model.llm.norm.weight
    before = last[-1].item()
    with torch.no_grad():
        last[-1] += 1
        changed = run.describe(model)
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
    report = run.evaluate(
        model,
        "refcoco_val",
        tmp_path / "a.json",
        golden / "images",
        tmp_path / "p.jsonl",
        model_facts=run.describe(model),
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
