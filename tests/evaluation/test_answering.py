from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, read_annotations
from sphinxkit.evaluation.answering import answer_questions, instruction
from sphinxkit.evaluation.inputs import Annotation
from sphinxkit.formatters import tasks
from sphinxkit.formatters.conversation import ConversationTemplate, sphinx_v1


@dataclass
class Answer:
    text: str


@dataclass
class Echo:
    """Answers with the number of the image's file; fails after some calls."""

    conversation: ConversationTemplate | None = field(default_factory=sphinx_v1)
    calls: list[list[str]] = field(default_factory=list)
    limit: int = 100

    def generate(self, prompts: Sequence[str], images: Sequence[Path], **options: Any) -> list[Answer]:
        if len(self.calls) >= self.limit:
            raise KeyboardInterrupt
        assert options["temperature"] == 0.0
        assert options["stop"] == ("\n###",)
        self.calls.append(list(prompts))
        return [Answer(f" {path.stem} ") for path in images]


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[Annotation], Path, Path]:
    records = [
        {"image_path": f"{i}.png", "question": f"q{i}", "question_id": i, "gt_answers": str(i % 2)} for i in range(5)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for index in range(5):
        (tmp_path / f"{index}.png").touch()
    return read_annotations(tmp_path / "a.json"), tmp_path, tmp_path / "out" / "p.jsonl"


def test_answers_are_written_and_scored_with_their_manifest(files: tuple[list[Annotation], Path, Path]) -> None:
    annotations, folder, output = files
    seen: list[tuple[int, int]] = []
    model = Echo()
    options: dict[str, Any] = {"batch_size": 2, "manifest": {"checkpoint": "c"}, "progress": lambda *n: seen.append(n)}
    assert answer_questions(model, benchmarks.get("gqa_testdev_balanced"), annotations, folder, output, **options) == 5
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.calls[0][0].endswith(
        "### Human: q0\nAnswer the question using a single word or phrase.\n### Assistant:"
    )
    report = benchmarks.score("gqa_testdev_balanced", folder / "a.json", output)
    assert report.scores == {"accuracy": 0.4}
    assert report.manifest["generation"]["checkpoint"] == "c"
    assert report.manifest["generation"]["template"] == "sphinx_v1"
    assert report.manifest["generation"]["decoding"]["temperature"] == 0.0


def test_a_run_that_was_stopped_goes_on(files: tuple[list[Annotation], Path, Path]) -> None:
    annotations, folder, output = files
    benchmark = benchmarks.get("gqa_testdev_balanced")
    with pytest.raises(KeyboardInterrupt):
        answer_questions(Echo(limit=1), benchmark, annotations, folder, output, batch_size=2)
    with output.open("a") as file:
        file.write('{"question_id": 2, "ans')  # cut off while writing
    assert answer_questions(Echo(), benchmark, annotations, folder, output, batch_size=2) == 3
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == ["0", "1", "2", "3", "4"]
    assert answer_questions(Echo(), benchmark, annotations, folder, output) == 0


def test_answers_made_otherwise_are_not_mixed(files: tuple[list[Annotation], Path, Path]) -> None:
    annotations, folder, output = files
    benchmark = benchmarks.get("gqa_testdev_balanced")
    answer_questions(Echo(), benchmark, annotations, folder, output, manifest={"checkpoint": "a"})
    with pytest.raises(DataError, match=r"p\.jsonl: its answers were made otherwise \(checkpoint differ"):
        answer_questions(Echo(), benchmark, annotations, folder, output, manifest={"checkpoint": "b"})
    with pytest.raises(DataError, match=r"p\.jsonl: 5 answers for 2 questions"):
        answer_questions(Echo(), benchmark, annotations[:2], folder, output, manifest={"checkpoint": "a"})
    with pytest.raises(DataError, match=r"p\.jsonl:1: question_id 0 where .*a\.json:1 has 1"):
        answer_questions(Echo(), benchmark, annotations[1:] * 2, folder, output, manifest={"checkpoint": "a"})


def test_faults(files: tuple[list[Annotation], Path, Path]) -> None:
    annotations, folder, output = files
    benchmark = benchmarks.get("vsr_val")
    with pytest.raises(DataError, match="evaluate: the model has no conversation template"):
        answer_questions(Echo(conversation=None), benchmark, annotations, folder, output)
    with pytest.raises(DataError, match="evaluate: batch_size must be at least 1, got 0"):
        answer_questions(Echo(), benchmark, annotations, folder, output, batch_size=0)
    (folder / "1.png").unlink()
    with pytest.raises(DataError, match=r"a\.json:1: there is no image .*1\.png"):
        answer_questions(Echo(), benchmark, annotations, folder, output)


def _annotation(question: str = "dog", **fields: Any) -> Annotation:
    return Annotation(0, "", question, "x", "a.json:1", (200, 100), fields)


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_can_be_asked(name: str) -> None:
    text = instruction(benchmarks.get(name), _annotation(box=[20, 10, 120, 60]))
    assert text.strip()
    assert ("[0.100,0.300,0.600,0.550]" in text) == (name in ("reg", "pose"))


def test_instructions() -> None:
    assert instruction(benchmarks.get("vsr_val"), _annotation("Is it?")) == "Is it?"
    assert "Page-footer" in instruction(benchmarks.get("doclaynet_val"), _annotation())
    assert benchmarks.get("scienceqa_test_img").answer_start == "The answer is"
    with pytest.raises(DataError, match=r"a\.json:1: the question is empty"):
        instruction(benchmarks.get("vsr_val"), _annotation(" "))
    with pytest.raises(DataError, match=r"a\.json:1: 'box' must be \[x1, y1, x2, y2\], got None"):
        instruction(benchmarks.get("pose"), _annotation())
    with pytest.raises(DataError, match=r"a\.json:1: .*outside the image"):
        instruction(benchmarks.get("reg"), _annotation(box=[0, 0, 500, 500]))
