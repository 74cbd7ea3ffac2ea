from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from sphinxkit.formatters import tasks
from sphinxkit.geometry import Box, Point
from sphinxkit.nano.world import COLORS, KINDS_OF_TASK, SHAPES, Scene, World
from sphinxkit.nano.world.phrases import relation, things

NUM_SCENES = 200
WORLDS = (World("synthetic"), World("real", "test", (112, 80)))
# Three decimals are off by at most half a unit of the last; the rest is what float64 loses on the way there and back.
ROUNDING = 0.0005 + 1e-9
ABSENT_RATE = (0.04, 0.2)  # of detection's categories; 12 % are drawn, fewer where nothing is absent


def flat(item: Any) -> tuple[Any, list[float]]:
    """What an item says, and its coordinates."""
    match item:
        case Box():
            return "box", [item.x1, item.y1, item.x2, item.y2]
        case Point():
            return "point", [item.x, item.y]
        case tasks.GroundedPhrase():
            return (item.phrase, item.start, len(item.boxes)), [x for box in item.boxes for x in flat(box)[1]]
        case tasks.Keypoints():
            return tuple(item.points), [x for point in item.points.values() for x in flat(point)[1]]
    return item, []


@pytest.mark.parametrize("task", KINDS_OF_TASK)
def test_answers_are_read_back(task: str) -> None:
    formatter = tasks.create(task)
    for world in WORLDS:
        for index in range(NUM_SCENES // len(WORLDS)):
            scene = world.scene(index, task)
            for sample in world.samples(index, task):
                result = formatter.parse(formatter.format(sample).answer, scene.geometry)
                assert not result.errors, (sample, result.errors)
                for found, expected in zip(result.items, formatter.items(sample), strict=True):
                    (words, numbers), (true_words, true_numbers) = flat(found), flat(expected)
                    assert words == true_words
                    tolerance = ROUNDING * scene.geometry.side
                    close = [
                        math.isclose(a, b, rel_tol=0, abs_tol=tolerance)
                        for a, b in zip(numbers, true_numbers, strict=True)
                    ]
                    assert all(close)


def test_every_task_has_scenes() -> None:
    assert set(KINDS_OF_TASK) == set(tasks.names())


def all_samples(task: str, count: int = 100) -> list[tuple[Scene, Any]]:
    world = World()
    return [(world.scene(index, task), sample) for index in range(count) for sample in world.samples(index, task)]


def test_detection_counts_and_boxes() -> None:
    found = all_samples("detection")
    for scene, sample in found:
        wanted = [thing.rect.box for thing in things(scene) if sample.category in (thing.noun, thing.name)]
        assert list(sample.boxes) == wanted
    absent = sum(not sample.boxes for _, sample in found) / len(found)
    assert ABSENT_RATE[0] < absent < ABSENT_RATE[1]


def test_relations_hold() -> None:
    for scene, sample in all_samples("relation"):
        rects = {f"the {thing.name}": thing.rect for thing in things(scene)}
        subject, other = rects[sample.subject.phrase], rects[sample.object.phrase]
        assert relation(subject, other) == sample.predicate
        assert (sample.subject.boxes, sample.object.boxes) == ((subject.box,), (other.box,))


def test_descriptions_tell_size_colour_and_shape() -> None:
    for scene, sample in all_samples("reg"):
        by_box = {shape.rect.box: f"{shape.size} {shape.color} {shape.shape}" for shape in scene.shapes}
        by_box |= {person.rect.box: f"person in {person.color}" for person in scene.people}
        assert sample.phrase == by_box[sample.box]


def test_pages_texts_people_and_charts_are_annotated_whole() -> None:
    for scene, sample in all_samples("layout"):
        assert sorted((kind, box.x1, box.y1) for kind, boxes in sample.regions.items() for box in boxes) == sorted(
            (block.kind, block.rect.x1, block.rect.y1) for block in scene.blocks
        )
    for scene, sample in all_samples("text_detection"):
        assert [(text.phrase, text.boxes) for text in sample.texts] == [(w.text, (w.rect.box,)) for w in scene.words]
    for scene, sample in all_samples("pose"):
        (person,) = (person for person in scene.people if person.rect.box == sample.box)
        assert sample.keypoints == person.keypoints
        assert all(0 < p.x < scene.width and 0 < p.y < scene.height for p in sample.keypoints.points.values())
    for scene, sample in all_samples("chart"):
        rows = [row.split(" | ") for row in sample.table.split("\n")]
        assert scene.chart is not None
        assert rows == [[bar.label, str(bar.value)] for bar in scene.chart.bars]


def test_choices_hold_the_answer_anywhere() -> None:
    letters = Counter()  # type: Counter[int]
    for _, sample in all_samples("multiple_choice"):
        assert 2 <= len(sample.choices) == len(set(sample.choices)) <= 4
        letters[sample.answer] += 1
    assert min(letters[letter] for letter in range(4)) > letters.total() / 12


def test_classes() -> None:
    labels = {sample.label for _, sample in all_samples("classification", 300)}
    assert labels == {*SHAPES, "person", "page", "chart"}


def test_vizwiz_asks_what_cannot_be_answered() -> None:
    found = [sample for _, sample in all_samples("vizwiz")]
    unanswerable = [sample for sample in found if sample.answer == "Unanswerable"]
    assert 10 < len(unanswerable) < len(found)
    assert all(sample.question.startswith("What color is the ") for sample in unanswerable)


def test_answers_have_no_majority() -> None:
    colors = Counter(s.answer for _, s in all_samples("vqa", 300) if s.question.startswith("What color"))
    assert set(colors) == set(COLORS)
    assert max(colors.values()) < colors.total() / 3
