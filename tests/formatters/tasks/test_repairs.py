"""What the parsers make of the ways in which models are wrong, and that they say so."""

from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import ERROR_KINDS, GroundedPhrase
from sphinxkit.formatters.tasks.base import MAX_QUOTE
from sphinxkit.formatters.tasks.grounding import escape, unescape
from sphinxkit.geometry import Box, ImageGeometry, Point

SQUARE = ImageGeometry(1000, 1000)
WIDE = ImageGeometry(1000, 500)  # 250 rows of padding above and below
GOOD = Box(100.0, 200.0, 300.0, 400.0)


def faults(result: tasks.ParseResult[Any]) -> list[str]:
    """Kinds of the faults, failures with a "!"."""
    assert {error.kind for error in result.errors} <= set(ERROR_KINDS)
    return [error.kind + ("" if error.is_repaired else "!") for error in result.errors]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", ["spaces"]),
        ("[0.1 0.2 0.3 0.4]", ["separator", "spaces"]),
        ("[0.1,0.2;0.3,0.4]", ["separator"]),
        ("[0.1;0.2;0.3;0.4]", ["separator"]),
        ("[0.1,,0.2,0.3,0.4]", ["separator"]),
        ("[0.1,0.2,0.3,0.4;]", ["separator"]),
        ("[0.1,0.2,0.3,0.4", ["missing_close_bracket"]),
        ("0.1,0.2,0.3,0.4]", ["missing_open_bracket"]),
        ("(0.1,0.2,0.3,0.4)", ["missing_open_bracket", "extra_text"]),
        ("[[0.1,0.2,0.3,0.4]]", ["doubled_bracket"]),
        ("[[0.1,0.2,0.3,0.4", ["doubled_bracket", "missing_close_bracket"]),
        ("[0.3,0.4,0.1,0.2]", ["swapped_corners"]),
        ("[0.3,0.2,0.1,0.4]", ["swapped_corners"]),
        ("It is at [0.1,0.2,0.3,0.4]", ["extra_text"]),
        ("<p>man</p>[0.1,0.2,0.3,0.4]", []),
        ("[0.1,0.2,0.3,0.4][0.5,0.5,0.6,0.6]", ["separator", "wrong_count"]),
        ("[0.1,0.2,0.3,0.4] [0.5,0.5,0.6,0.6]", ["separator", "wrong_count"]),
        ("[0.1,0.2,0.3,0.4;0.5,0.5,0.6,0.6]", ["wrong_count"]),
        ("[0.1,0.2,0.3,0.4,0.5,0.5,0.6,0.6]", ["separator", "wrong_count"]),
        ("[0.1,0.2,0.3;0.1,0.2,0.3,0.4]", ["wrong_count!"]),
        ("[1e-1,.2,+0.3,4e-1]", []),
    ],
)
def test_repaired_boxes(text: str, kinds: list[str]) -> None:
    result = tasks.create("rec").parse(text, SQUARE)
    assert result.items == (GOOD,)
    assert faults(result) == kinds
    assert result.is_strict == (not kinds)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", ["no_coordinates!"]),
        ("I cannot find it.", ["no_coordinates!"]),
        ("[0.1,0.2,0.3]", ["wrong_count!"]),
        ("[0.1,0.2,0.3,0.4,0.5]", ["wrong_count!"]),
        ("[0.1,0.2,x,0.4]", ["not_a_number!"]),
        ("[0.1,0.2,nan,0.4]", ["not_a_number!"]),
        ("[0.1,0.2,0.3,0." + "4" * 40 + "]", ["not_a_number!"]),
        ("[100,200,300,400]", ["out_of_range!"]),
        ("[0.1,0.2,0.3,1.2]", ["out_of_range!"]),
        ("[0.1,0.2,0.3,1e999]", ["out_of_range!"]),
    ],
)
def test_failed_boxes(text: str, kinds: list[str]) -> None:
    result = tasks.create("rec").parse(text, SQUARE)
    assert result.items == ()
    assert faults(result) == kinds
    assert result.failures == result.errors


@pytest.mark.parametrize(
    ("text", "items", "kinds"),
    [
        ("[0.1,0.3,0.3,0.4]", (Box(100.0, 50.0, 300.0, 150.0),), []),
        ("[-0.05,0.3,0.3,0.4]", (Box(0.0, 50.0, 300.0, 150.0),), ["clipped_value"]),
        ("[0.1,0.2,0.3,0.4]", (Box(100.0, 0.0, 300.0, 150.0),), ["clipped"]),
        ("[0.1,0.0,0.3,1.0]", (Box(100.0, 0.0, 300.0, 500.0),), ["clipped"]),
        ("[0.1,0.0,0.3,0.2]", (), ["outside_image!"]),
        ("[0.1,0.8,0.3,0.9]", (), ["outside_image!"]),
    ],
)
def test_boxes_in_the_padding(text: str, items: tuple[Box, ...], kinds: list[str]) -> None:
    result = tasks.create("rec").parse(text, WIDE)
    assert len(result.items) == len(items)
    for found, expected in zip(result.items, items, strict=True):
        assert corners(found) == pytest.approx(corners(expected))
    assert faults(result) == kinds


def corners(box: Box) -> tuple[float, ...]:
    return box.x1, box.y1, box.x2, box.y2


@pytest.mark.parametrize(
    ("text", "items", "kinds"),
    [
        ("<p>dog</p> [0.1,0.2,0.3,0.4]", ["dog"], ["spaces"]),
        ("<p>dog[0.1,0.2,0.3,0.4]", ["dog"], ["missing_close_tag"]),
        ("<p>dog[0.1,0.2,0.3,0.4]</p>", ["dog"], ["missing_close_tag", "missing_open_tag!"]),
        ("dog</p>[0.1,0.2,0.3,0.4]", ["dog"], ["missing_open_tag"]),
        ("< p >dog< /P>[0.1,0.2,0.3,0.4]", ["dog"], ["tag_spelling", "tag_spelling"]),
        ("<p>dog</p>0.1,0.2,0.3,0.4]", ["dog"], ["missing_open_bracket"]),
        ("dog: [0.1,0.2,0.3,0.4]", [""], ["extra_text", "missing_phrase"]),
        ("<p>dog</p>[[0.1,0.2,0.3,0.4],[0.1,0.2,0.3,0.4]]", ["dog"], ["doubled_bracket", "separator"]),
        ("<p>dog</p>[0.1,0.2,0.3,0.4] and a cat", ["dog"], ["extra_text"]),
        ("<p>dog</p>", [], ["no_coordinates!"]),
        ("<p>dog</p>[0.1,0.2]", [], ["wrong_count!"]),
        ("<p>dog", [], ["missing_close_tag!", "extra_text"]),
        ("<p>cat <p>dog</p>[0.1,0.2,0.3,0.4]", ["dog"], ["missing_close_tag!", "extra_text"]),
        ("none", [], ["extra_text", "empty!"]),
        ("", [], ["empty!"]),
    ],
)
def test_grounded_phrases(text: str, items: list[str], kinds: list[str]) -> None:
    result = tasks.create("detection").parse(text, SQUARE)
    assert [item.phrase for item in result.items] == items
    for item in result.items:
        assert set(item.boxes) == {GOOD}
    assert faults(result) == kinds


@pytest.mark.parametrize(
    ("text", "plain", "items", "kinds"),
    [
        ("A <p>dog</p> runs.", "A dog runs.", [], ["no_coordinates!"]),
        ("A <p>dog runs.", "A dog runs.", [], ["missing_close_tag!"]),
        ("A dog</p>[0.1,0.2,0.3,0.4] runs.", "A dog runs.", [("A dog", 0)], ["missing_open_tag"]),
        ("A dog[0.1,0.2,0.3,0.4] runs.", "A dog runs.", [], ["missing_phrase!"]),
        ("A <p>dog[0.1,0.2,0.3,0.4] runs.", "A dog runs.", [("dog", 2)], ["missing_close_tag"]),
        ("A <p>dog</p>[] runs.", "A dog runs.", [], ["no_coordinates!"]),
        ("A <p>dog</p>[;] runs.", "A dog runs.", [], ["separator", "separator", "no_coordinates!"]),
        ("", "", [], ["empty!"]),
    ],
)
def test_grounded_captions(text: str, plain: str, items: list[tuple[str, int]], kinds: list[str]) -> None:
    result = tasks.create("grounded_caption").parse(text, SQUARE)
    assert result.text == plain
    assert [(item.phrase, item.start) for item in result.items] == items
    assert faults(result) == kinds


def test_layout_names() -> None:
    task = tasks.create("layout", classes="doclaynet")
    text = "<p>list item</p>[0.1,0.2,0.3,0.4] <p>chapter</p>[0.1,0.2,0.3,0.4] <p>List-item</p>[0.1,0.2,0.3,0.4]"
    result = task.parse(text, SQUARE)
    assert result.items == (GroundedPhrase("List-item", (GOOD, GOOD)),)
    assert faults(result) == ["wording", "unknown_name!", "duplicate"]
    assert faults(task.parse("[0.1,0.2,0.3,0.4]", SQUARE)) == ["missing_phrase!"]
    assert faults(task.parse("no", SQUARE)) == ["extra_text", "empty!"]


def test_relations_have_two_sides() -> None:
    one = "<p>a</p>[0.1,0.2,0.3,0.4]"
    task = tasks.create("relation")
    assert faults(task.parse(one, SQUARE)) == ["wrong_count!"]
    three = task.parse(f"{one} {one} {one}", SQUARE)
    assert len(three.items) == 2
    assert faults(three) == ["wrong_count"]


def test_key_points() -> None:
    task = tasks.create("pose")
    text = (
        "<p>Left Eye</p>[0.1,0.2] <p>tail</p>[0.1,0.2] <p>left_eye</p>[0.3,0.3] <p>nose</p>[0.1,0.2;0.3,0.4] "
        "[0.5,0.5] <p>left_hip</p>[0.1]"
    )
    result = task.parse(text, SQUARE)
    assert [dict(item.points) for item in result.items] == [{"left_eye": Point(100.0, 200.0)}]
    # the stray pair is taken for a second point of the nose
    assert faults(result) == ["wording", "unknown_name!", "duplicate!", "separator", "wrong_count!", "wrong_count!"]
    near = task.parse("<p>nose</p>[0.500,0.200]", WIDE)  # 50 pixels above the image
    assert near.items[0].points == {"nose": Point(500.0, 0.0)}
    assert faults(near) == ["clipped"]
    assert faults(task.parse("<p>nose</p>[0.500,0.100]", WIDE)) == ["outside_image!"]
    assert faults(task.parse("[0.1,0.2]", SQUARE)) == ["missing_phrase!"]
    assert faults(task.parse("", SQUARE)) == ["empty!"]


@pytest.mark.parametrize(
    ("text", "letter", "kinds"),
    [
        ("B.", "B", ["wording"]),
        ("(C)", "C", ["wording"]),
        ("B. Low", "B", ["wording"]),
        ("The answer is D.", "D", ["wording"]),
        ("**B**", "B", ["wording"]),
        ("The answer is **B**.", "B", ["wording"]),
        ("`C`. Low", "C", ["wording"]),
        ("I think the answer: E", "E", ["wording"]),
        ("I think it is B.", "B", ["wording"]),
        ("option (C)", "C", ["wording"]),
        ("C low", "C", ["wording"]),
        ("b", "B", ["wording"]),
        ("Blue", None, ["wording!"]),
        ("A dog", None, ["wording!"]),
        ("It is A dog", None, ["wording!"]),
        ("I do not know", None, ["wording!"]),
        ("1", None, ["wording!"]),
        ("", None, ["empty!"]),
    ],
)
def test_letters(text: str, letter: str | None, kinds: list[str]) -> None:
    result = tasks.create("multiple_choice").parse(text)
    assert result.items == ((letter,) if letter else ())
    assert faults(result) == kinds


def test_letters_behind_the_words_put_into_the_mouth() -> None:
    task = tasks.create("multiple_choice", answer_start=" The answer is")
    assert task.answer_start == "The answer is"
    sample = tasks.MultipleChoiceSample("q", ("x", "y"), 1)
    assert task.format(sample).answer == "The answer is B"
    assert task.parse("The answer is B").is_strict
    assert task.parse("B").is_strict


@pytest.mark.parametrize(
    ("text", "label", "kinds"),
    [
        ("tabby cat", "tabby cat", ["wording"]),
        ("This is an owl.", "owl", ["wording"]),
        ("It is the sea", "sea", ["wording"]),
        ("This is a cat", "cat", ["wording"]),
        (".", None, ["empty!"]),
        ("", None, ["empty!"]),
    ],
)
def test_labels(text: str, label: str | None, kinds: list[str]) -> None:
    result = tasks.create("classification").parse(text)
    assert result.items == ((label,) if label else ())
    assert faults(result) == kinds


def test_empty_words() -> None:
    result = tasks.create("vqa").parse("  ")
    assert (result.items, faults(result)) == ((), ["empty!"])


def test_an_error_says_where_and_quotes() -> None:
    result = tasks.create("rec").parse("at [0.1,0.2,0.3," + "x" * 200 + "]", SQUARE)
    error = result.failures[0]
    assert (error.kind, error.position) == ("not_a_number", 4)
    assert error.text == ("0.1,0.2,0.3," + "x" * 200)[:MAX_QUOTE]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain [text] <b> 3 < 4; [1] [x, y]", "plain [text] <b> 3 < 4; [1] [x, y]"),
        ("<p>", r"<\p>"),
        ("</p>", r"<\/p>"),
        (r"<\p>", r"<\\p>"),
        ("< P >", r"<\ P >"),
        ("[0.1,0.2", r"[\0.1,0.2"),
        (r"[\1 2", r"[\\1 2"),
        (r"C:\dir", r"C:\dir"),
    ],
)
def test_escaping(text: str, escaped: str) -> None:
    assert escape(text) == escaped
    assert unescape(escaped) == text
