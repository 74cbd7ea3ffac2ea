"""What holds for every task: answers give their sample back, and no text harms a parser."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import ERROR_KINDS, GroundedPhrase, Keypoints
from sphinxkit.formatters.tasks.base import MAX_ERRORS
from sphinxkit.geometry import Box, ImageGeometry, Point

# Three decimals are off by at most half a unit of the last; the rest is what float64 loses on the way there and back.
ROUNDING = 0.0005
NOISE = 1e-9

MARKUP = [
    "<p>",
    "</p>",
    "[0.1,0.2,0.3,0.4]",
    "[0.5, 0.5]",
    "[",
    "]",
    "\\",
    "<",
    "p>",
    "/",
    " ",
    ";",
    "0.5,",
    "< P >",
    "\n",
    "é",
]

geometries = st.builds(ImageGeometry, st.integers(1, 4000), st.integers(1, 4000))
unit = st.floats(0.0, 1.0)
tricky = st.lists(st.sampled_from(MARKUP) | st.characters(codec="utf-8"), min_size=1, max_size=12).map("".join)
words = tricky.filter(str.strip)


def points_in(geometry: ImageGeometry) -> st.SearchStrategy[Point]:
    return st.builds(lambda x, y: Point(x * geometry.width, y * geometry.height), unit, unit)


def boxes_in(geometry: ImageGeometry) -> st.SearchStrategy[Box]:
    def build(a: Point, b: Point) -> Box:
        return Box(min(a.x, b.x), min(a.y, b.y), max(a.x, b.x), max(a.y, b.y))

    return st.builds(build, points_in(geometry), points_in(geometry))


def some_boxes(geometry: ImageGeometry, least: int = 1) -> st.SearchStrategy[tuple[Box, ...]]:
    return st.lists(boxes_in(geometry), min_size=least, max_size=3).map(tuple)


def phrases(geometry: ImageGeometry) -> st.SearchStrategy[GroundedPhrase]:
    return st.builds(GroundedPhrase, words, some_boxes(geometry))


@st.composite
def grounded_captions(draw: st.DrawFn, geometry: ImageGeometry) -> tasks.GroundedCaptionSample:
    caption, grounded = draw(words).lstrip(), []
    for phrase in draw(st.lists(phrases(geometry), max_size=3)):
        caption += draw(tricky)
        text = phrase.phrase if caption.strip() else phrase.phrase.lstrip()
        caption = caption if caption.strip() else ""
        grounded.append(GroundedPhrase(text, phrase.boxes, len(caption)))
        caption += text
    return tasks.GroundedCaptionSample(caption + ".", tuple(grounded), geometry)


@st.composite
def choices(draw: st.DrawFn, geometry: ImageGeometry) -> tasks.MultipleChoiceSample:
    options = draw(st.lists(words, min_size=1, max_size=5).map(tuple))
    answer = draw(st.integers(0, len(options) - 1))
    return tasks.MultipleChoiceSample(draw(words), options, answer, draw(st.just("") | words))


def keypoints(geometry: ImageGeometry) -> st.SearchStrategy[Keypoints]:
    names = st.sampled_from(tasks.COCO_KEYPOINTS)
    return st.builds(Keypoints, st.dictionaries(names, points_in(geometry), min_size=1))


def samples(name: str, geometry: ImageGeometry) -> st.SearchStrategy[Any]:
    at = st.just(geometry)
    layout_class = st.sampled_from(tasks.PUBLAYNET_CLASSES)
    return {
        "vqa": st.builds(tasks.QuestionSample, words, words),
        "vizwiz": st.builds(tasks.QuestionSample, words, words),
        "multiple_choice": choices(geometry),
        "caption": st.builds(tasks.CaptionSample, words),
        "detailed_caption": st.builds(tasks.CaptionSample, words),
        "chart": st.builds(tasks.ChartSample, words),
        "classification": st.builds(tasks.ClassificationSample, words),
        "rec": st.builds(tasks.RegionSample, words, boxes_in(geometry), at),
        "reg": st.builds(tasks.RegionSample, words, boxes_in(geometry), at),
        "relation": st.builds(tasks.RelationSample, phrases(geometry), words, phrases(geometry), at),
        "grounded_caption": grounded_captions(geometry),
        "detection": st.builds(tasks.DetectionSample, words, some_boxes(geometry, least=0), at),
        "layout": st.builds(
            tasks.LayoutSample, st.dictionaries(layout_class, some_boxes(geometry), min_size=1, max_size=5), at
        ),
        "text_detection": st.builds(
            tasks.TextDetectionSample, st.lists(phrases(geometry), min_size=1, max_size=4).map(tuple), at
        ),
        "pose": st.builds(tasks.PoseSample, keypoints(geometry), boxes_in(geometry), at),
    }[name]


def coordinates(item: Any) -> list[float]:
    """Every coordinate of an item, in a fixed order."""
    match item:
        case Box():
            return [item.x1, item.y1, item.x2, item.y2]
        case Point():
            return [item.x, item.y]
        case GroundedPhrase():
            return [number for box in item.boxes for number in coordinates(box)]
        case Keypoints():
            return [number for point in item.points.values() for number in coordinates(point)]
        case _:
            return []


def label(item: Any) -> Any:
    """What an item says beside its coordinates."""
    match item:
        case GroundedPhrase():
            return item.phrase, item.start, len(item.boxes)
        case Keypoints():
            return list(item.points)
        case str():
            return item
        case _:
            return type(item)


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...], geometry: ImageGeometry) -> None:
    assert [label(item) for item in found] == [label(item) for item in expected]
    tolerance = (ROUNDING + NOISE) * geometry.side
    for left, right in zip(found, expected, strict=True):
        for a, b in zip(coordinates(left), coordinates(right), strict=True):
            assert math.isclose(a, b, rel_tol=0.0, abs_tol=tolerance), (a, b, tolerance)


def assert_inside(items: tuple[Any, ...], geometry: ImageGeometry) -> None:
    for item in items:
        numbers = coordinates(item)
        assert all(0.0 <= x <= geometry.width for x in numbers[::2]), item
        assert all(0.0 <= y <= geometry.height for y in numbers[1::2]), item
        if isinstance(item, Box | GroundedPhrase):
            for i in range(0, len(numbers), 4):
                assert numbers[i] <= numbers[i + 2]
                assert numbers[i + 1] <= numbers[i + 3]


TASKS = tasks.names()


@pytest.mark.parametrize("name", TASKS)
@given(data=st.data())
def test_an_answer_gives_its_sample_back(name: str, data: st.DataObject) -> None:
    geometry = data.draw(geometries)
    task = tasks.create(name)
    sample = data.draw(samples(name, geometry))
    wording = data.draw(st.integers(0, len(task.wordings) - 1))
    result = task.parse(task.format(sample, wording).answer, geometry)
    assert result.is_strict, result.errors
    assert_same(result.items, task.items(sample), geometry)
    assert_inside(result.items, geometry)
    if name == "grounded_caption":
        assert result.text == sample.caption


@pytest.mark.parametrize("name", TASKS)
@given(data=st.data())
def test_white_space_around_an_answer_is_no_fault(name: str, data: st.DataObject) -> None:
    """A model's answer begins with a space; conversations strip theirs."""
    geometry = data.draw(geometries)
    task = tasks.create(name)
    sample = data.draw(samples(name, geometry))
    result = task.parse(f" {task.format(sample).answer.strip()}\n", geometry)
    assert result.is_strict, result.errors
    assert_same(result.items, task.items(sample), geometry)


def example_answers() -> dict[str, list[str]]:
    """Good answers of every task, to be spoilt."""
    box, boxes = "[0.100,0.250,0.300,0.400]", "[0.100,0.250,0.300,0.400;0.500,0.500,0.900,0.750]"
    spoilt = {
        "rec": [box],
        "relation": [f"<p>man</p>{box} <p>horse</p>{boxes}"],
        "grounded_caption": [f"<p>A man</p>{box} rides <p>two horses</p>{boxes} on a beach."],
        "detection": [f"<p>dog</p>{boxes}", "<p>dog</p>[]"],
        "layout": [f"<p>text</p>{boxes} <p>figure</p>{box}"],
        "text_detection": [f"<p>EXIT</p>{box} <p>50% [off]</p>{boxes}"],
        "pose": ["<p>nose</p>[0.500,0.300] <p>left_eye</p>[0.520,0.280] <p>right_hip</p>[0.450,0.700]"],
        "multiple_choice": ["B", "The answer is C."],
        "classification": ["This is a tabby cat."],
    }
    return {name: spoilt.get(name, ["a short answer"]) for name in TASKS}


PIECES = [
    *("[", "]", ";", ",", " ", ".", "-", "<p>", "</p>", "<", ">", "/", "p", "0", "1", "9", "e", "\\", "\n", "(", "nan"),
    *("1e999", "-0.02", "1.003", "12", "0.5", "[[", "]]", "<P>", "< /p>", "nose", "\ud800", "\u0661", "\x00", "é"),
]


def spoil(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 5)):
        at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        match rng.randint(0, 4):
            case 0:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[at + 1 :]
            case 2:
                text = text[:at] + rng.choice(PIECES) + text[at + 1 :]
            case 3:
                text = text[:at] + text[at : min(to, at + 30)] + text[at:]
            case _:
                text = text[:to]
    return text


def fuzz(count: int, seed: int) -> set[str]:
    rng = random.Random(seed)
    answers = example_answers()
    built = {name: tasks.create(name) for name in TASKS}
    geometries = [tasks_geometry(rng) for _ in range(50)]
    kinds = set()
    for _ in range(count):
        name = rng.choice(TASKS)
        geometry = rng.choice(geometries)
        answer = spoil(rng, rng.choice(answers[name]))
        result = built[name].parse(answer, geometry)
        assert_inside(result.items, geometry)
        assert result.items or result.failures or result.text, (name, answer)  # nothing disappears without a word
        for error in result.errors:
            assert 0 <= error.position <= len(answer)
            assert answer.startswith(error.text, error.position)
        kinds.update(error.kind for error in result.errors)
    return kinds


def tasks_geometry(rng: random.Random) -> ImageGeometry:
    return ImageGeometry(rng.randint(1, 2000), rng.randint(1, 2000))


def test_spoilt_answers() -> None:
    kinds = fuzz(20_000, seed=1)
    assert kinds <= set(ERROR_KINDS)
    assert set(ERROR_KINDS) - kinds <= {"gave_up"}  # every fault that is documented does occur


@pytest.mark.slow
def test_a_hundred_thousand_spoilt_answers() -> None:
    fuzz(100_000, seed=2)


@pytest.mark.parametrize("name", TASKS)
@given(text=st.lists(st.sampled_from(PIECES) | st.sampled_from(MARKUP) | st.text(max_size=3), max_size=30).map("".join))
@example(text="[</p>[")  # a bracket with nothing in it
@example(text="[</p>[;")  # or a separator alone
def test_no_text_harms_a_parser(name: str, text: str) -> None:
    geometry = ImageGeometry(640, 427)
    result = tasks.create(name).parse(text, geometry)
    assert_inside(result.items, geometry)
    assert result.items or result.failures or result.text


REPEATED = [
    *("[", "]", "<p>", "</p>", "<p>a", "a</p>", "[]", "<p>a</p>[]", "<p>a</p>[0.1,0.3,0.3,0.4]", "[0.1,0.3,0.3,0.4]"),
    *("0.1,0.3,0.3,0.4;", "[1,2 ", "[[ ", "[\\", "<\\", "1,", "1", " ", "< ", "</p>   ", "answer is ", "this is ", "a"),
]


PARSERS = ["rec", "grounded_caption", "layout", "multiple_choice", "classification"]


def run_repeated(length: int, limit: float) -> None:
    geometry = ImageGeometry(640, 427)
    for name in PARSERS:  # each way of reading once: the other tasks share one
        task = tasks.create(name)
        for piece in REPEATED:
            for start in ("", "<p>a</p>["):
                text = start + piece * (length // len(piece))
                began = time.process_time()
                result = task.parse(text, geometry)
                took = time.process_time() - began
                assert took < limit, (name, piece, start, took)
                assert len(result.errors) <= MAX_ERRORS + 1


def test_long_answers_take_linear_time() -> None:
    # 30 kB take about 0.02 s; anything quadratic would take 30 000^2 steps: ten seconds and more.
    run_repeated(30_000, limit=2.0)


@pytest.mark.slow
def test_a_megabyte_takes_about_a_second() -> None:
    # 0.3 to 0.6 s of processor time measured; the bound of one second is for an idle machine
    run_repeated(1_000_000, limit=3.0)


def test_a_parser_gives_up_after_many_errors() -> None:
    result = tasks.create("detection").parse("<p>dog</p>[0.1,0.2,0.3,0.4] " + "<p>" * 5000, ImageGeometry(100, 100))
    assert [item.phrase for item in result.items] == ["dog"]
    assert len(result.errors) == MAX_ERRORS + 1
    assert [error.kind for error in result.errors if error.kind == "gave_up"] == ["gave_up"]
    assert not result.errors[-1].is_repaired
