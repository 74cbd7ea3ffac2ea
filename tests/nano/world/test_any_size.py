"""Pictures of any size and shape; those of up to 255 pixels stay what they were."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import pytest

from sphinxkit.errors import DataError
from sphinxkit.nano.world import KINDS_OF_TASK, World
from sphinxkit.nano.world.phrases import MARGIN, referring_phrases, things


@pytest.mark.parametrize(
    ("size", "digest"), [(64, "4e27469f4f99443b"), (128, "56d958066a831be3"), ((128, 96), "78824230bf6371c3")]
)
def test_scenes_of_small_pictures_never_change(size: int | tuple[int, int], digest: str) -> None:
    """The shipped weights, their scores and the exported sets were made with these."""
    found = hashlib.sha256()
    for domain in ("real", "synthetic"):
        world = World(domain, size=size, point_grid=128)  # type: ignore[arg-type]
        for task in KINDS_OF_TASK:
            found.update(json.dumps(world.record(1, task, 3)).encode())
            found.update(world.scene(1, task).image.tobytes())
    assert found.hexdigest()[:16] == digest


def test_every_scene_has_a_size_and_shape_of_its_own() -> None:
    world = World(long_sides=(96, 1000), max_aspect=200)
    sizes = [(scene.width, scene.height) for scene in (world.scene(index, "vqa") for index in range(150))]
    assert all(96 <= max(size) <= 1000 and min(size) >= 64 for size in sizes)
    assert all(max(size) * 100 <= min(size) * 202 for size in sizes if min(size) > 64)
    shapes = Counter((width > height) - (width < height) for width, height in sizes)
    assert min(shapes.values()) > 15
    assert max(map(max, sizes)) > 600
    assert [(s.width, s.height) for s in (world.scene(index, "vqa") for index in range(5))] == sizes[:5]
    scene = world.scene(3, "vqa")
    assert scene.image.shape == (scene.height, scene.width, 3)


@pytest.mark.parametrize("task", ["rec", "detection", "layout", "pose", "text_detection", "relation"])
def test_coordinates_are_told_on_the_grid_at_any_size(task: str) -> None:
    world = World(long_sides=(96, 1000), point_grid=128)
    on_grid = {f"{step / 128:.3f}" for step in range(129)}
    for index in range(8):
        for message in world.conversation(index, task)[1]:
            assert set(re.findall(r"\d\.\d{3}", message["content"])) <= on_grid


def test_things_of_large_pictures_keep_as_much_apart() -> None:
    """The leftmost of its kind is farther left by as large a share of the picture, whatever its size."""
    factor = 1000 // 128
    world = World(size=1000)
    leftmost = 0
    for index in range(60):
        scene = world.scene_of_kind(index, "shapes")
        rects = [shape.rect for shape in scene.shapes]
        assert all(
            a.x2 + 2 * factor <= b.x1
            or b.x2 + 2 * factor <= a.x1
            or a.y2 + 2 * factor <= b.y1
            or b.y2 + 2 * factor <= a.y1
            for a in rects
            for b in rects
            if a is not b
        )
        for thing in things(scene):
            if any(phrase.startswith("the leftmost") for phrase in referring_phrases(scene, thing)):
                leftmost += 1
                alike = [x for x in things(scene) if x.source is not thing.source and x.name == thing.name]
                centre = thing.rect.twice_centre[0]
                assert all(centre + 2 * MARGIN * factor <= other.rect.twice_centre[0] for other in alike)
    assert leftmost


def test_what_cannot_be() -> None:
    with pytest.raises(DataError, match=r"long_sides must be two numbers from 64 in order, got \[200, 100\]"):
        World(long_sides=(200, 100))
    with pytest.raises(DataError, match=r"long_sides must be two numbers from 64 in order, got \[60, 100\]"):
        World(long_sides=(60, 100))
    with pytest.raises(DataError, match="max_aspect must be at least 100 .* got 99 and 0"):
        World(max_aspect=99)
    with pytest.raises(DataError, match="everyday_percent a percentage, got 200 and 101"):
        World(everyday_percent=101)
    with pytest.raises(DataError, match="rounds must be at least 1, .* got 0, 0 and 0"):
        World(rounds=0)
    with pytest.raises(DataError, match="context_percent percentages, got 1, 101 and 0"):
        World(told_first_percent=101)
    with pytest.raises(DataError, match="context_percent percentages, got 1, 0 and -1"):
        World(context_percent=-1)
    with pytest.raises(DataError, match="choice_letters must be at least 1, got 0"):
        World(choice_letters=0)
    with pytest.raises(DataError, match="question_starts must be a list of beginnings, got 'What'"):
        World(question_starts="What")
