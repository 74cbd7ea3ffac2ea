"""Dense targets: hand-made scenes with hand-computed answers, and laws that hold in every scene."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.nano.perception import targets
from sphinxkit.nano.perception.targets import (
    BINS,
    CELLS,
    CHARACTERS,
    MARKS,
    MAX_COUNT,
    NO_CHARACTER,
    NO_COLOR,
    NO_THING,
    THINGS,
    Targets,
    View,
    make_targets,
)
from sphinxkit.nano.world import COLORS, KINDS, SHAPES, Rect, Scene, World, render
from sphinxkit.nano.world.figures import Pose
from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.palette import DARK
from sphinxkit.nano.world.scene import Bar, Block, Chart, Person, Shape, Word

WHOLE = View(0, 0, 64)
# A key point in float32 units of a view's side.
FLOAT32 = 1e-6


def scene(kind: str = "shapes", side: int = 64, **holds: Any) -> Scene:
    return Scene(side, side, "synthetic", "train", kind, (240, 240, 240), 0, **holds)


def shape(name: str, color: str, x1: int, y1: int, x2: int, y2: int) -> Shape:
    return Shape(name, color, "small", x2 - x1, Rect(x1, y1, x2, y2), COLORS[color])


def grid(found: Targets) -> Any:
    return found.thing.reshape(CELLS, CELLS)


def written(found: Targets) -> dict[str, set[tuple[int, int]]]:
    """Character to the (row, column) of its marks."""
    marks = found.characters.reshape(MARKS, MARKS)
    places: dict[str, set[tuple[int, int]]] = {}
    for row, column in zip(*np.nonzero(marks != NO_CHARACTER), strict=True):
        places.setdefault(CHARACTERS[marks[row, column]], set()).add((int(row), int(column)))
    return places


def test_a_shapes_cells() -> None:
    found = make_targets(scene(shapes=(shape("ring", "blue", 8, 16, 24, 32),)), WHOLE)
    expected = np.full((CELLS, CELLS), NO_THING)
    expected[2:4, 1:3] = THINGS.index("ring")
    assert np.array_equal(grid(found), expected)
    covered = expected.reshape(-1) != NO_THING
    assert set(found.color[covered]) == {list(COLORS).index("blue")}
    assert set(found.color[~covered]) == {NO_COLOR}
    assert np.array_equal(found.box[covered], [[8, 16, 24, 32]] * 4)
    assert not found.box[~covered].any()
    assert found.counts.tolist() == [targets.KINDS.index("shapes"), 1, 0, 0, 0, 0]
    assert np.flatnonzero(found.pairs).tolist() == [list(COLORS).index("blue") * len(SHAPES) + SHAPES.index("ring")]
    assert written(found) == {}


def test_the_smallest_thing_has_a_cell_and_covers_larger_ones() -> None:
    tiny, large = shape("star", "red", 30, 30, 33, 33), shape("square", "green", 0, 0, 64, 64)
    for order in ((tiny, large), (large, tiny)):
        found = grid(make_targets(scene(shapes=order), WHOLE))
        assert found[3, 3] == THINGS.index("star")
        found[3, 3] = THINGS.index("square")
        assert (found == THINGS.index("square")).all()


def test_views_clip_and_leave_out() -> None:
    half, quarter = shape("heart", "red", 24, 8, 40, 24), shape("cross", "red", 26, 24, 34, 32)
    found = make_targets(scene(shapes=(half, quarter)), View(32, 0, 32))
    expected = np.full((CELLS, CELLS), NO_THING)
    expected[2:6, 0:2] = THINGS.index("heart")  # 8 of its 16 columns are seen; of the cross 2 of 8, too few
    assert np.array_equal(grid(found), expected)
    assert np.array_equal(found.box.reshape(CELLS, CELLS, 4)[2, 0], [0, 16, 16, 48])
    assert found.counts.tolist()[1] == 1
    assert found.pairs.sum() == 1


def test_counts_stop_at_the_most() -> None:
    many = tuple(shape("circle", "red", 6 * n, 0, 6 * n + 5, 5) for n in range(10))
    assert make_targets(scene(shapes=many), WHOLE).counts.tolist()[1] == MAX_COUNT


def test_words_at_marks() -> None:
    word = Word("AB", 1, Rect(10, 20, 21, 27), DARK, None)
    found = make_targets(scene("texts", words=(word,)), WHOLE)
    # a mark is four pixels; the middles of those at 10 to 15 are 10 and 14, of those at 16 to 21 it is 18
    assert written(found) == {"A": {(5, 2), (5, 3), (6, 2), (6, 3)}, "B": {(5, 4), (6, 4)}}
    assert set(grid(found)[grid(found) != NO_THING]) == {THINGS.index("word")}
    assert set(found.color) == {NO_COLOR}
    panel = (Rect(8, 18, 23, 29), "yellow", COLORS["yellow"])
    on_sign = make_targets(scene("texts", words=(replace(word, panel=panel),)), WHOLE)
    assert set(on_sign.color) == {NO_COLOR, list(COLORS).index("yellow")}


def test_letters_that_begin_behind_their_edge() -> None:
    """An I's ink begins one pixel inside its place."""
    found = make_targets(scene("texts", words=(Word("IX", 2, Rect(10, 8, 30, 22), DARK, None),)), WHOLE)
    assert {column for _, column in written(found)["I"]} == {2, 3, 4}  # pixels 8 to 19
    assert {column for _, column in written(found)["X"]} == {5, 6, 7}  # pixels 20 to 31


def test_letters_outside_a_view_are_not_told() -> None:
    word = Word("ABCD", 2, Rect(20, 8, 66, 22), DARK, None)
    left = make_targets(scene("texts", 128, words=(word,)), View(0, 0, 64))
    assert set(written(left)) == {"A", "B", "C", "D"}  # the middle of the D is at 62
    assert set(written(make_targets(scene("texts", 128, words=(word,)), View(64, 0, 64)))) == set()


def test_words_of_a_title_are_where_they_are_drawn() -> None:
    block = Block("title", Rect(4, 4, 60, 11), ("ILI", "TO"))
    page = scene("page", columns=((block,),))
    ink = (render(page) == DARK).all(axis=2)
    assert np.array_equal(ink[4:11, 4:19], text_mask("ILI"))
    assert np.array_equal(ink[4:11, 23:34], text_mask("TO"))
    starts = {text: left for text, left, _, _ in targets._texts(page)}
    assert starts == {"ILI": 4, "TO": 23}
    found = make_targets(page, WHOLE)
    assert {column for _, column in written(found)["T"]} == {6}  # pixels 23 to 28: the middle of 24 to 27
    assert set(written(found)) == set("ILTO")
    assert THINGS.index("title") in grid(found)
    assert found.counts.tolist() == [targets.KINDS.index("page"), 0, 0, 0, 1, 0]


@pytest.mark.parametrize("size", [64, 128])
def test_every_text_is_where_it_is_drawn(size: int) -> None:
    """The ink at the told place is the text's: words, titles, a chart's labels and values."""
    world = World(size=size)
    count = 0
    for kind in ("texts", "page", "chart"):
        for index in range(12):
            found = world.scene_of_kind(index, kind)
            for text, left, top, scale in targets._texts(found):
                mask = text_mask(text, scale)
                region = render(found)[top : top + mask.shape[0], left : left + mask.shape[1]]
                assert len(np.unique(region[mask], axis=0)) == 1, (kind, index, text)
                assert not (region[~mask] == region[mask][0]).all(axis=1).any(), (kind, index, text)
                count += 1
    assert count > 60


def test_labels_and_values_of_charts() -> None:
    bars = (
        Bar("ABU", 7, "red", Rect(8, 20, 20, 50), (6, 53), (12, 10)),
        Bar("COD", 12, "blue", Rect(40, 8, 52, 50), (38, 53), (40, 1)),
    )
    found = make_targets(scene("chart", chart=Chart(False, 1, bars, Rect(4, 50, 60, 51))), WHOLE)
    assert set(written(found)) == set("ABUCOD712")
    assert {column for _, column in written(found)["7"]} == {3}  # pixels 12 to 17: the middle of 12 to 15
    assert grid(found)[4, 1] == grid(found)[4, 5] == THINGS.index("bar")
    assert found.color.reshape(CELLS, CELLS)[4, 5] == list(COLORS).index("blue")
    assert found.counts.tolist() == [targets.KINDS.index("chart"), 0, 0, 0, 0, 2]


def test_key_points() -> None:
    pose = Pose((4, 4, 4, 4, 1, 1, 1, 1), "front")
    rows, columns = Person(pose, 50, "red", Rect(0, 0, 1, 1), COLORS["red"]).figure.labels.shape
    person = Person(pose, 50, "red", Rect(10, 6, 10 + columns, 6 + rows), COLORS["red"])
    crowd = scene("people", 128, people=(person,))
    found = make_targets(crowd, View(0, 0, 64))
    cell = int(np.flatnonzero(found.thing == THINGS.index("person"))[0])
    for index, name in enumerate(COCO_KEYPOINTS):
        x, y = person.pixels[name]
        assert found.points[cell, index] == pytest.approx(((x + 0.5) / 64, (y + 0.5) / 64), abs=FLOAT32)
        assert bool(found.point_seen[cell, index]) == (x < 64 and y < 64)
    assert not found.point_seen[found.thing == NO_THING].any()
    # the middle of the figure at the left edge: what is left of it is not seen
    middle = 10 + columns // 2
    cut = make_targets(crowd, View(middle, 0, 64))
    cell = int(np.flatnonzero(cut.thing == THINGS.index("person"))[0])
    seen = {name for name, is_seen in zip(COCO_KEYPOINTS, cut.point_seen[cell], strict=True) if is_seen}
    assert seen == {name for name, (x, _) in person.pixels.items() if x >= middle}
    assert set() < seen < set(COCO_KEYPOINTS)


def test_all_kinds_of_scenes_are_known() -> None:
    assert set(targets.KINDS) == set(KINDS)
    assert set(SHAPES) < set(THINGS)


@given(
    st.integers(0, 10**9),
    st.sampled_from(targets.KINDS),
    st.sampled_from([("synthetic", "train"), ("real", "test")]),
    st.sampled_from([View(0, 0, 128), View(64, 0, 64), View(0, 64, 64), View(30, 40, 50)]),
)
def test_targets_lie_in_range(index: int, kind: str, style: tuple[Any, str], view: View) -> None:
    found = make_targets(World(style[0], style[1], 128).scene_of_kind(index, kind), view)
    for values, shape_, most in (
        (found.thing, (64,), NO_THING),
        (found.color, (64,), NO_COLOR),
        (found.box, (64, 4), BINS),
        (found.characters, (256,), NO_CHARACTER),
        (found.counts, (6,), max(MAX_COUNT, len(KINDS) - 1)),
        (found.pairs, (64,), 1),
        (found.point_seen, (64, 17), 1),
    ):
        assert values.shape == shape_
        assert values.min() >= 0
        assert values.max() <= most
    assert found.points.shape == (64, 17, 2)
    seen = found.points[found.point_seen]
    assert ((seen >= 0) & (seen <= 1)).all()
    covered = found.thing != NO_THING
    assert (found.color[~covered] == NO_COLOR).all()
    assert (found.box[covered, 2:] >= found.box[covered, :2]).all()
    has_points = found.point_seen.any(axis=1)
    assert (found.thing[has_points] == THINGS.index("person")).all()
