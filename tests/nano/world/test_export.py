from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sphinxkit.data.mixture import Mixture
from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, read_annotations, score
from sphinxkit.evaluation.questions import make_questions
from sphinxkit.formatters import sphinx_v1, tasks
from sphinxkit.nano.world import KINDS_OF_TASK, World, annotation, export_annotations, export_records, render
from sphinxkit.nano.world.export import _question_and_gold

PERFECT_KEYS = ("accuracy", "vqa_accuracy", "anls", "precision_at_1", "f1", "recall", "pck", "bleu_1", "bleu1", "cider")
# Boxes in answers have three decimals, so a key point may be off by 0.0005 of the side; PCK and IoU do not notice.


@pytest.fixture
def world() -> World:
    return World("real", "test", (80, 112))


@pytest.mark.parametrize("task", KINDS_OF_TASK)
def test_perfect_answers_score_full_marks(task: str, world: World, tmp_path: Path) -> None:
    path = export_annotations(world, task, 12, tmp_path, start=100)
    formatter = tasks.create(task)
    samples = [world.samples(index, task)[0] for index in range(100, 112)]
    answers = [formatter.format(sample).answer for sample in samples]
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps(answers))
    report = score(task, path, predictions)
    assert report.count == 12
    assert report.unparsable == 0
    primary = [value for key, value in report.scores.items() if key in PERFECT_KEYS[:-3]]
    if primary:
        assert primary == [1.0] * len(primary)
    else:
        assert formatter.metric == "caption"
    predictions.write_text(json.dumps(["nothing"] * 12))
    worse = score(task, path, predictions)
    assert all(worse.scores[key] < 1 for key in report.scores if key in PERFECT_KEYS[:-3])


@pytest.mark.parametrize("task", KINDS_OF_TASK)
def test_questions_are_put_as_in_training(task: str, world: World, tmp_path: Path) -> None:
    template = sphinx_v1()
    annotations = read_annotations(export_annotations(world, task, 5, tmp_path))
    found = make_questions(benchmarks.get(task), annotations, tmp_path, template)
    for index, question in enumerate(found):
        expected = tasks.create(task).format(world.samples(index, task)[0]).instruction
        assert question.prompt == template.prompt([{"role": "user", "content": expected}])
        assert question.image is not None
        assert question.image.exists()
        assert annotations[index].size == (80, 112)


def test_pictures_are_the_scenes(world: World, tmp_path: Path) -> None:
    export_annotations(world, "pose", 3, tmp_path)
    for index in range(3):
        found = annotation(world, index, "pose")
        with Image.open(tmp_path / found["image_path"]) as image:
            assert np.array_equal(np.asarray(image), render(world.scene(index, "pose")))
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_annotations_by_hand(world: World) -> None:
    found = annotation(world, 4, "rec")
    sample: Any = world.samples(4, "rec")[0]
    assert found == {
        "question_id": "real-test-80x112-0-rec-4",
        "image_path": "images/real-test-80x112-0-rec-4.png",
        "width": 80,
        "height": 112,
        "dataset_name": "real-test-80x112-0-rec",
        "question": sample.phrase,
        "gt_answers": [sample.box.x1, sample.box.y1, sample.box.x2, sample.box.y2],
    }


def test_records_are_read_by_the_mixture(tmp_path: Path) -> None:
    world = World(size=64)
    paths = [export_records(world, task, 6, tmp_path, num_turns=2) for task in ("detection", "text")]
    found = Mixture([{"path": str(paths[0])}, {"path": str(paths[1]), "type": "text"}], batch_size=2)
    samples = [found.read(ref) for ref in found.order()]
    assert sorted(sample.task for sample in samples) == ["detection"] * 6 + ["text"] * 6
    assert all(sample.type == "text" or sample.open_image().size == (64, 64) for sample in samples)


def test_what_cannot_be_exported(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="count must be at least 1, got 0"):
        export_annotations(world, "vqa", 0, tmp_path)
    with pytest.raises(DataError, match="count must be at least 1, got -1"):
        export_records(world, "vqa", -1, tmp_path)
    with pytest.raises(DataError, match="no scenes for task 'zoo'"):
        export_annotations(world, "zoo", 1, tmp_path)
    with pytest.raises(DataError, match="no annotation form for str"):
        _question_and_gold("vqa", "a sample of nothing")
