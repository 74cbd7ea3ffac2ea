"""SPHINX-nano's scores on held-out scenes of every task, beside two baselines."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.atomic import atomic_file
from sphinxkit.batch_inference import fingerprint
from sphinxkit.evaluation import evaluate, read_annotations, score
from sphinxkit.nano.world import World, export_annotations
from sphinxkit.nano.world.scene import Domain
from sphinxkit.recipe import load

SCORES_FILE = "scores.json"
NUM_SCENES = 500
SEED = 20231113
"""Seed of the held-out scenes; training uses 0. What is held out does not depend on the seed; see ``world.splits``."""

NUM_COUNTED = 2000  # training answers that the most frequent one is found among
BATCH_SIZE = 50


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the table.

    Args:
        name: Name of the line.
        task: The task whose scenes the questions are about.
        score: Name of the task's score.
        goal: The score that the model should reach.
        max_new_tokens: Longest answer.
    """

    name: str
    task: str
    score: str
    goal: float
    max_new_tokens: int


ROWS = (
    TableRow("VQA accuracy", "vqa", "vqa_accuracy", 0.90, 16),
    TableRow("OCR, all words exact", "text_detection", "exact", 0.80, 80),
    TableRow("REC, IoU >= 0.5", "rec", "precision_at_1", 0.80, 12),
    TableRow("REG exact", "reg", "exact", 0.85, 16),
    TableRow("detection F1@0.5", "detection", "f1", 0.70, 64),
    TableRow("layout F1@0.5", "layout", "f1", 0.70, 128),
    TableRow("pose PCK@0.1", "pose", "pck", 0.70, 160),
    TableRow("grounded caption, phrase and box recall", "grounded_caption", "recall", 0.70, 128),
)
"""The table's lines; the goals are the project's own."""

MORE_ROWS = (
    TableRow("multiple choice", "multiple_choice", "accuracy", 0.85, 8),
    TableRow("chart, cells", "chart", "cells", 0.90, 64),
)
"""Further lines, measured on pictures of every size; see ``any_size``."""


def majority_answer(task: str, size: int, domain: Domain) -> str:
    """The most frequent answer in training.

    Args:
        task: The task.
        size: Side of the pictures.
        domain: Domain of the scenes.
    """
    world = World(domain, size=size)
    answers = (world.conversation(index, task)[1][1]["content"] for index in range(NUM_COUNTED))
    return Counter(answers).most_common(1)[0][0]


def evaluate_nano(
    model: str | Path,
    folder: str | Path,
    *,
    rows: Sequence[TableRow] = ROWS,
    domain: Domain = "synthetic",
    num_scenes: int = NUM_SCENES,
    baselines: bool = True,
    size: int | tuple[int, int] | None = None,
    shrink_to: tuple[int, int] | None = None,
    seed: int = SEED,
    should_stop: Callable[[], bool] | None = None,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> bool:
    """Score a model on held-out scenes of every task and write ``scores.json``.

    A call resumes where an earlier one stopped.

    Scenes and predictions stay in the folder: ``sphinxkit score TASK --annotations FOLDER/TASK/annotations.json
    --predictions FOLDER/TASK/model.jsonl`` gives each number again.

    Args:
        model: Checkpoint.
        folder: Folder for scenes, predictions and scores.
        rows: The table's lines.
        domain: Domain of the scenes.
        num_scenes: Scenes of each task, one question each.
        baselines: Whether the blind model and the most frequent answer are scored as well.
        size: Size of the pictures: a square's side, or (width, height); None: the model's.
        shrink_to: (width, height) that the drawn pictures are shrunk to, of the same shape as ``size``; None: as drawn.
        seed: Seed of the scenes.
        should_stop: Asked between parts.
        report: Called with each score.
    Returns:
        Whether everything is scored.
    """
    loaded = load(model)
    facts = fingerprint(loaded)
    own_size = 64 if loaded.vision is None else loaded.vision.image_size
    place = Path(folder)
    world = World(domain, "test", size or own_size, seed)
    found: dict[str, Any] = {"model": facts, "world": world.name, "num_scenes": num_scenes, "rows": {}}
    if shrink_to is not None:
        found["shrunk_to"] = list(shrink_to)
    for row in rows:
        here = place / row.task
        annotations = here / "annotations.json"
        if not annotations.exists():
            export_annotations(world, row.task, num_scenes, here)
        if shrink_to is not None:
            _shrink(here / "images", shrink_to)
        began = time.perf_counter()
        scores: dict[str, Any] = {"task": row.task, "score": row.score, "goal": row.goal}
        for name in ("model", "blind", "majority") if baselines else ("model",):
            if should_stop is not None and should_stop():
                return False
            predictions = here / f"{name}.jsonl"
            if name == "majority":
                _write_constant(predictions, annotations, majority_answer(row.task, own_size, domain))
                result = score(row.task, annotations, predictions)
            else:
                result = evaluate(
                    loaded,
                    row.task,
                    annotations,
                    here,
                    predictions,
                    batch_size=BATCH_SIZE,
                    max_new_tokens=row.max_new_tokens,
                    withhold_images=name == "blind",
                )
            every = dict(result.scores)
            if row.score == "cells":
                every["cells"] = chart_cells(annotations, predictions)
            scores[name] = every[row.score]
            if name == "model":
                scores["scores"], scores["unparsable"] = every, result.unparsable
        scores["seconds"] = round(time.perf_counter() - began, 1)
        found["rows"][row.name] = scores
        if report is not None:
            report({"row": row.name, **{key: value for key, value in scores.items() if key != "scores"}})
    with atomic_file(place / SCORES_FILE) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return True


def _shrink(folder: Path, size: tuple[int, int]) -> None:
    """Make every picture of a folder smaller; its annotations stay those of the drawn one, of which they are shares."""
    from PIL import Image

    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if image.size != size:
            with atomic_file(path) as temporary:
                image.resize(size, Image.Resampling.BOX).save(temporary, format="PNG")


def chart_cells(annotations: Path, predictions: Path) -> float:
    """The share of the charts' cells (labels and values) that stand in their place in the answered tables.

    Args:
        annotations: Of the task ``chart``.
        predictions: Lines of ``question_id`` and ``answer``.
    """
    lines = (json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines())
    answers = {line["question_id"]: str(line.get("answer") or "") for line in lines}
    right = total = 0
    for gold in read_annotations(annotations):
        told = _cells(answers.get(gold.question_id, ""))
        for place, cell in _cells(str(gold.gold)).items():
            total += 1
            right += told.get(place) == cell
    return right / max(total, 1)


def _cells(table: str) -> dict[tuple[int, int], str]:
    rows = [line.split("|") for line in table.strip().splitlines()]
    return {(row, column): cell.strip() for row, cells in enumerate(rows) for column, cell in enumerate(cells)}


def _write_constant(path: Path, annotations: Path, answer: str) -> None:
    lines = [json.dumps({"question_id": x.question_id, "answer": answer}) for x in read_annotations(annotations)]
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_scores(output: str | Path) -> dict[str, Any]:
    """The scores that the last stage of ``reproduce_nano`` wrote."""
    document: dict[str, Any] = json.loads((Path(output) / "scores" / SCORES_FILE).read_text(encoding="utf-8"))
    return document


def table(scores: Mapping[str, Any]) -> str:
    """The table of ``scores.json``, in Markdown."""
    lines = ["| task | goal | SPHINX-nano | blind | most frequent answer |", "|---|---|---|---|---|"]
    for name, row in scores["rows"].items():
        baselines = [f"{row[key]:.3f}" if key in row else "" for key in ("blind", "majority")]
        lines.append(f"| {name} | {row['goal']:.2f} | {row['model']:.3f} | {' | '.join(baselines)} |")
    return "\n".join(lines)
