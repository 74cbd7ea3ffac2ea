"""Worlds as files: held-out questions for ``sphinxkit score`` and ``evaluate``, conversations for other trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.geometry import Box
from sphinxkit.nano.world.render import render
from sphinxkit.nano.world.scene import Scene
from sphinxkit.nano.world.world import TEXT_TASK, World


def _corners(box: Box) -> list[float]:
    return [box.x1, box.y1, box.x2, box.y2]


def _grounded(phrases: Sequence[tasks.GroundedPhrase]) -> list[dict[str, Any]]:
    return [{"phrase": phrase.phrase, "boxes": [_corners(box) for box in phrase.boxes]} for phrase in phrases]


def _question_and_gold(task: str, sample: Any) -> dict[str, Any]:
    """``question``, ``gt_answers`` and, for tasks about a region, ``box``, in original pixels."""
    match sample:
        case tasks.QuestionSample():
            return {"question": sample.question, "gt_answers": sample.answer}
        case tasks.MultipleChoiceSample():
            lines = [f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", sample.choices, strict=False)]
            question = "\n".join(["Question:", sample.question, "Choices:", *lines])
            return {"question": question, "gt_answers": "ABCDEFGHIJ"[sample.answer]}
        case tasks.CaptionSample():
            return {"question": "", "gt_answers": [sample.caption]}
        case tasks.ChartSample():
            return {"question": "", "gt_answers": sample.table}
        case tasks.ClassificationSample():
            return {"question": "", "gt_answers": sample.label}
        case tasks.RegionSample() if task == "rec":
            return {"question": sample.phrase, "gt_answers": _corners(sample.box)}
        case tasks.RegionSample():
            return {"question": "", "gt_answers": [sample.phrase], "box": _corners(sample.box)}
        case tasks.RelationSample():
            words = f"{sample.subject.phrase} {sample.predicate} {sample.object.phrase}"
            return {"question": words, "gt_answers": _grounded((sample.subject, sample.object))}
        case tasks.GroundedCaptionSample():
            return {"question": "", "gt_answers": _grounded(sample.phrases), "caption": sample.caption}
        case tasks.DetectionSample():
            gold = [{"category": sample.category, "boxes": [_corners(box) for box in sample.boxes]}]
            return {"question": sample.category, "gt_answers": gold}
        case tasks.TextDetectionSample():
            return {"question": "", "gt_answers": _grounded(sample.texts)}
        case tasks.LayoutSample():
            gold = [
                {"label": name, "boxes": [_corners(box) for box in boxes]} for name, boxes in sample.regions.items()
            ]
            return {"question": "", "gt_answers": gold}
        case tasks.PoseSample():
            points = {name: [point.x, point.y] for name, point in sample.keypoints.points.items()}
            return {"question": "", "gt_answers": points, "box": _corners(sample.box)}
    raise DataError(f"world: no annotation form for {type(sample).__name__}")


def annotation(world: World, index: int, task: str) -> dict[str, Any]:
    """One question with its answer, as ``sphinxkit.evaluation.read_annotations`` takes it.

    Args:
        world: Where it is from.
        index: Number of the scene.
        task: A name of ``task_samples.KINDS_OF_TASK``.
    Returns:
        ``question_id``, ``image_path``, ``width``, ``height``, ``question``, ``gt_answers`` and what the task needs
        besides; boxes and points in original pixels.
    Raises:
        DataError: The task has no scenes, or the index is negative.
    """
    return _annotation(world, index, task, world.scene(index, task))


def _annotation(world: World, index: int, task: str, scene: Scene) -> dict[str, Any]:
    return {
        "question_id": world.record_id(index, task),
        "image_path": world.image_path(index, task),
        "width": scene.width,
        "height": scene.height,
        "dataset_name": f"{world.name}-{task}",
        **_question_and_gold(task, world.samples(index, task)[0]),
    }


def _save_image(scene: Scene, path: Path) -> None:
    from PIL import Image

    with atomic_file(path) as temporary:
        Image.fromarray(render(scene)).save(temporary, format="PNG")


def export_annotations(world: World, task: str, count: int, folder: str | Path, start: int = 0) -> Path:
    """Write questions about ``count`` scenes as ``annotations.json`` and ``images/*.png``.

    ``sphinxkit evaluate MODEL TASK --annotations FOLDER/annotations.json --images FOLDER`` asks them, ``sphinxkit
    score TASK`` scores answers.

    Args:
        world: Usually of split ``test``.
        task: A name of ``task_samples.KINDS_OF_TASK``.
        count: How many scenes; one question each.
        folder: Made if it is not there.
        start: The first scene.
    Returns:
        The path of ``annotations.json``, which is written last.
    Raises:
        DataError: The task has no scenes, or ``count`` is not positive.
    """
    if count < 1:
        raise DataError(f"world: count must be at least 1, got {count}")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = []
    for index in range(start, start + count):
        scene = world.scene(index, task)
        found.append(_annotation(world, index, task, scene))
        _save_image(scene, folder / found[-1]["image_path"])
    path = folder / "annotations.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(found, ensure_ascii=False, indent=0), encoding="utf-8")
    return path


def export_records(world: World, task: str, count: int, folder: str | Path, start: int = 0, num_turns: int = 1) -> Path:
    """Write ``count`` records as ``<task>.jsonl``, which ``Mixture`` reads, and their pictures as ``images/*.png``.

    Args:
        world: Where they are from.
        task: A name of ``world.TASKS``.
        count: How many.
        folder: Made if it is not there.
        start: The first.
        num_turns: Questions about a scene, at most.
    Returns:
        The path of the JSON lines, which are written last.
    Raises:
        DataError: The task has no scenes, or ``count`` is not positive.
    """
    if count < 1:
        raise DataError(f"world: count must be at least 1, got {count}")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.jsonl"
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index in range(start, start + count):
            record = world.record(index, task, num_turns)
            if task != TEXT_TASK:
                _save_image(world.scene(index, task), folder / record["image"])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path
