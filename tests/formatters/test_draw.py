from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageColor

from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.formatters.draw import (
    COCO_SKELETON,
    PALETTE,
    draw_boxes,
    draw_items,
    draw_keypoints,
    find_places,
    rank_palette,
)
from sphinxkit.formatters.tasks import COCO_KEYPOINTS, GroundedPhrase, Keypoints
from sphinxkit.geometry import Box, ImageGeometry, Point

RED = (255, 0, 0)


def blank(width: int = 200, height: int = 100, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), "white" if mode != "P" else 0)


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.difference(before.convert("RGB"), after).getbbox()


def test_a_box_is_where_it_says() -> None:
    image = blank()
    drawn = draw_boxes(image, [Box(20.0, 30.0, 60.0, 80.0)], colours=["red"])
    assert changed(image, drawn) == (20, 30, 60, 80)
    assert drawn.getpixel((20, 30)) == drawn.getpixel((59, 79)) == RED
    assert drawn.getpixel((40, 50)) == (255, 255, 255)
    assert changed(image, image) is None  # the original is untouched


def test_rounded_coordinates_give_the_pixels_that_they_were_written_from() -> None:
    image = blank(112, 112)
    [box] = tasks.create("rec").parse("[0.652,0.491,0.866,0.705]", ImageGeometry(112, 112)).items
    assert changed(image, draw_boxes(image, [box])) == (73, 55, 97, 79)


@pytest.mark.parametrize("colour", ["white", "black", *PALETTE])
def test_colours_are_far_from_the_picture(colour: str) -> None:
    image = Image.new("RGB", (200, 100), colour)

    def distance(other: str) -> float:
        pairs = zip(ImageColor.getrgb(colour), ImageColor.getrgb(other), strict=True)
        return math.dist(*zip(*pairs, strict=True))

    ranked = sorted(PALETTE, key=distance, reverse=True)
    assert list(rank_palette(image)) == ranked
    drawn = draw_boxes(image, [Box(0.0, 0.0, 10.0, 10.0), Box(50.0, 50.0, 60.0, 60.0)])
    shown = (drawn.getpixel((0, 0)), drawn.getpixel((50, 50)))
    assert shown == (ImageColor.getrgb(ranked[0]), ImageColor.getrgb(ranked[1]))


def test_a_small_thing_counts_for_the_colours() -> None:
    image = Image.new("RGB", (100, 100), "white")
    first = rank_palette(image)[0]
    image.paste(first, (40, 40, 60, 60))  # a twenty-fifth of the picture
    assert rank_palette(image)[0] != first


@pytest.mark.parametrize(("colour", "edge"), [("red", (255, 255, 255)), ("yellow", (0, 0, 0))])
def test_a_thin_line_parts_a_box_from_a_picture_of_its_colour(colour: str, edge: tuple[int, ...]) -> None:
    image = Image.new("RGB", (200, 100), colour)
    drawn = draw_boxes(image, [Box(20.0, 30.0, 60.0, 80.0)], colours=[colour])
    assert changed(image, drawn) == (21, 31, 59, 79)
    assert drawn.getpixel((21, 31)) == edge


@pytest.mark.parametrize("at", [(0.0, 0.0), (150.0, 90.0), (199.0, 99.0)])
def test_labels_stay_in_the_picture(at: tuple[float, float]) -> None:
    image = blank()
    box = Box(*at, 200.0, 100.0)
    plain, labelled = draw_boxes(image, [box]), draw_boxes(image, [box], labels=["a label\nof many words " * 5])
    assert changed(plain, labelled) is not None
    assert labelled.size == image.size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_any_mode(mode: str) -> None:
    assert draw_boxes(blank(mode=mode), [Box(0.0, 0.0, 1.0, 1.0)], ["x"]).mode == "RGB"


def test_the_skeleton_joins_coco_key_points() -> None:
    assert len(COCO_SKELETON) == 19
    assert {name for bone in COCO_SKELETON for name in bone} == set(COCO_KEYPOINTS)


def test_key_points_and_bones() -> None:
    image = blank()
    points = {"left_hip": Point(20.0, 50.0), "left_knee": Point(100.0, 50.0), "nose": Point(180.0, 20.0)}
    drawn = draw_keypoints(image, Keypoints(points), colour="red")
    assert drawn.getpixel((60, 50)) == RED  # the thigh
    assert drawn.getpixel((180, 20)) != (255, 255, 255)
    assert drawn.getpixel((140, 35)) == (255, 255, 255)  # nothing joins knee and nose


def test_items_of_every_kind() -> None:
    image = blank()
    geometry = ImageGeometry(200, 100)
    detection = tasks.create("detection").parse("<p>dog</p>[0.1,0.3,0.3,0.7;0.5,0.3,0.7,0.7]", geometry)
    drawn = draw_items(image, detection.items)
    assert drawn.getpixel((20, 49)) == drawn.getpixel((100, 49))  # one colour for one phrase
    items = [Box(1.0, 1.0, 9.0, 9.0), GroundedPhrase("cat", (Box(50.0, 50.0, 70.0, 70.0),)), "two words"]
    items += [Point(120.0, 40.0), Keypoints({"nose": Point(150.0, 40.0)})]
    drawn = draw_items(image, items)
    for x, y in ((1, 1), (50, 69), (120, 40), (150, 40), (1, 99)):
        assert drawn.getpixel((x, y)) != (255, 255, 255), (x, y)
    assert changed(image, draw_items(image, [])) is None


def test_errors() -> None:
    with pytest.raises(DataError, match="draw: 1 labels for 2 boxes"):
        draw_boxes(blank(), [Box(0, 0, 1, 1)] * 2, labels=["x"])
    with pytest.raises(DataError, match="draw: 3 colours for 2 boxes"):
        draw_boxes(blank(), [Box(0, 0, 1, 1)] * 2, colours=["red"] * 3)
    with pytest.raises(DataError, match="draw: cannot draw a dict"):
        draw_items(blank(), [{}])


def test_places_of_an_answer_to_any_question() -> None:
    geometry = ImageGeometry(200, 100)  # padded by 50 above
    answer = (
        "A <p>red ball</p>[0.1,0.3,0.2,0.4;0.5,0.5,0.6,0.6] lies [0.25,0.5,0.5,0.75] near <p>Nose</p>[0.5,0.5] "
        "<p>left eye</p>[0.6,0.5] <p>nose</p>[0.1,0.5] and <p>door</p>[0.5,0.25;0.25,0.5]."
    )
    found = find_places(answer, geometry)
    assert found.items == (
        GroundedPhrase("red ball", (Box(20.0, 10.0, 40.0, 30.0), Box(100.0, 50.0, 120.0, 70.0))),
        GroundedPhrase("", (Box(50.0, 50.0, 100.0, 100.0),)),
        Keypoints({"nose": Point(100.0, 50.0), "left_eye": Point(120.0, 50.0)}),
        Keypoints({"nose": Point(20.0, 50.0)}),
        Point(100.0, 0.0),
        Point(50.0, 50.0),
    )
    assert not found.failures
    assert find_places("No places, [1] or [see, there].", geometry).items == ()
    assert find_places("<p>dog</p>[] [0.1,x,0.2,0.3]", geometry).items == ()


@given(st.text(alphabet="<p>/[],;.0159 nose", max_size=80))
def test_no_answer_breaks_the_search_for_places(answer: str) -> None:
    drawn = draw_items(blank(), find_places(answer, ImageGeometry(200, 100)).items)
    assert drawn.size == (200, 100)
