from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sphinxkit.errors import DataError
from sphinxkit.nano.world import KINDS, SIZES, Rect, Rng, Scene, Style, World, compose
from sphinxkit.nano.world.render import paint_block, paint_person, paint_shape, paint_word

WORLDS = [
    World("synthetic"),
    World("real", "test", (96, 160)),
    World("synthetic", size=(200, 64)),
    World("real", size=224, sizes=("tiny",), has_small_text=True),
]
NUM_SCENES = 25
KEY_COLOR = (1, 2, 3)  # no colour of the palette


def scenes(kind: str) -> list[Scene]:
    return [world.scene_of_kind(index, kind) for world in WORLDS for index in range(NUM_SCENES)]


def extent(scene: Scene, paint: Any, thing: Any, *rest: Any) -> Rect:
    """The extent of what a thing changes on an empty picture."""
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.uint8)
    canvas[:] = KEY_COLOR
    paint(canvas, thing, *rest)
    changed = (canvas != KEY_COLOR).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return Rect(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_annotations_are_the_extent_of_what_is_drawn(kind: str) -> None:
    for scene in scenes(kind):
        assert all(extent(scene, paint_shape, shape) == shape.rect for shape in scene.shapes)
        assert all(extent(scene, paint_word, replace(word, panel=None)) == word.rect for word in scene.words)
        assert all(extent(scene, paint_person, person) == person.rect for person in scene.people)
        assert all(extent(scene, paint_block, block, KEY_COLOR) == block.rect for block in scene.blocks)
        signs = [word for word in scene.words if word.panel]
        assert all(word.panel and extent(scene, paint_word, word) == word.panel[0] for word in signs)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overlaps_and_all_is_inside(kind: str) -> None:
    for scene in scenes(kind):
        rects = [thing.rect for thing in (*scene.shapes, *scene.people, *scene.blocks)]
        rects += [word.panel[0] if word.panel else word.rect for word in scene.words]
        rects += [bar.rect for bar in scene.chart.bars] if scene.chart else []
        assert rects
        for index, rect in enumerate(rects):
            assert 0 <= rect.x1 < rect.x2 <= scene.width
            assert 0 <= rect.y1 < rect.y2 <= scene.height
            for other in rects[:index]:
                apart = rect.x1 >= other.x2 or rect.x2 <= other.x1 or rect.y1 >= other.y2 or rect.y2 <= other.y1
                assert apart, (scene, rect, other)


def test_sizes_have_one_name_each() -> None:
    bounds = sorted(SIZES.values())
    assert all(before[1] < after[0] for before, after in pairwise(bounds))
    for scene in scenes("shapes"):
        for shape in scene.shapes:
            low, high = SIZES[shape.size]
            short = min(scene.width, scene.height)
            assert max(5, low * short // 1000) <= shape.side <= max(5, high * short // 1000)


def test_shapes_in_a_scene() -> None:
    assert {len(scene.shapes) for scene in scenes("shapes")} >= {2, 3, 4, 5}
    assert {len(scene.shapes) for scene in scenes("single")} == {1}
    few = World(max_objects=2)
    assert max(len(few.scene_of_kind(index, "shapes").shapes) for index in range(40)) == 2


def test_a_scene_is_much_the_same_at_another_size() -> None:
    small, large = World(size=112).scene_of_kind(3, "people"), World(size=448).scene_of_kind(3, "people")
    assert [person.pose for person in small.people] == [person.pose for person in large.people]


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="domain 'dream', expected real or synthetic"):
        Style(domain="dream")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="63 x 200 pixels, expected at least 64"):
        Style(63, 200)
    with pytest.raises(DataError, match="max_objects must be at least 1, got 0"):
        Style(max_objects=0)
    with pytest.raises(DataError, match="sizes \\['huge'\\], expected some of tiny"):
        Style(sizes=("huge",))
    with pytest.raises(DataError, match="split 'dev'"):
        Style(split="dev")
    with pytest.raises(DataError, match="scene kind 'zoo', expected one of single"):
        compose(Rng(0), Style(), "zoo")
