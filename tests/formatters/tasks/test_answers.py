"""Three answers of every task, written and computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints
from sphinxkit.geometry import Box, ImageGeometry, Point

# Pixels are exact decimals times the side: only float64's last bits are lost.
TOLERANCE = 1e-9

SQUARE = ImageGeometry(1000, 1000)  # side 1000, no padding
WIDE = ImageGeometry(640, 480)  # side 640, 80 rows of padding above and below
TALL = ImageGeometry(300, 501)  # side 501, 100 columns of padding on the left and 101 on the right


def numbers(item: Any) -> Any:
    match item:
        case Box():
            return [item.x1, item.y1, item.x2, item.y2]
        case GroundedPhrase():
            return item.phrase, item.start, [numbers(box) for box in item.boxes]
        case Keypoints():
            return {name: [point.x, point.y] for name, point in item.points.items()}
        case _:
            return item


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(close(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(close(found[key], expected[key]) for key in expected)
    return abs(found - expected) < TOLERANCE if isinstance(expected, float) else found == expected


ANSWERS: list[tuple[str, ImageGeometry, str, list[Any]]] = [
    ("vqa", SQUARE, "two dogs", ["two dogs"]),
    ("vqa", WIDE, "Yes", ["Yes"]),
    ("vqa", TALL, " 3.5%\n", ["3.5%"]),
    ("vizwiz", SQUARE, "Unanswerable", ["Unanswerable"]),
    ("vizwiz", WIDE, "a can of beans", ["a can of beans"]),
    ("vizwiz", TALL, "20", ["20"]),
    ("multiple_choice", SQUARE, "B", ["B"]),
    ("multiple_choice", WIDE, " A ", ["A"]),
    ("multiple_choice", TALL, "Z", ["Z"]),
    ("caption", SQUARE, "A cat [sic] sleeps.", ["A cat [sic] sleeps."]),
    ("caption", WIDE, "Two men.", ["Two men."]),
    ("caption", TALL, "x", ["x"]),
    ("detailed_caption", SQUARE, "One.\n\nTwo.", ["One.\n\nTwo."]),
    ("detailed_caption", WIDE, "A wall.", ["A wall."]),
    ("detailed_caption", TALL, "Nothing; at all", ["Nothing; at all"]),
    ("chart", SQUARE, "Year | Value\n2020 | 3", ["Year | Value\n2020 | 3"]),
    ("chart", WIDE, "a\tb", ["a\tb"]),
    ("chart", TALL, "7", ["7"]),
    ("classification", SQUARE, "This is a tabby cat.", ["tabby cat"]),
    ("classification", WIDE, "This is a St. Bernard.", ["St. Bernard"]),
    ("classification", TALL, " This is a 2.5 m pole.. ", ["2.5 m pole."]),
    # x * 1000; x * 640 and y * 640 - 80; x * 501 - 100 and y * 501
    ("rec", SQUARE, "[0.100,0.250,0.300,0.400]", [[100.0, 250.0, 300.0, 400.0]]),
    ("rec", WIDE, "[0.125,0.250,0.500,0.750]", [[80.0, 80.0, 320.0, 400.0]]),
    ("rec", TALL, "[0.400,0.000,0.600,1.000]", [[100.4, 0.0, 200.6, 501.0]]),
    ("reg", SQUARE, "the left cat", ["the left cat"]),
    ("reg", WIDE, "man in red", ["man in red"]),
    ("reg", TALL, "it", ["it"]),
    (
        "relation",
        SQUARE,
        "<p>man</p>[0.100,0.100,0.200,0.200] <p>horse</p>[0.000,0.500,1.000,1.000]",
        [("man", None, [[100.0, 100.0, 200.0, 200.0]]), ("horse", None, [[0.0, 500.0, 1000.0, 1000.0]])],
    ),
    (
        "relation",
        WIDE,
        "<p>cup</p>[0.5,0.5,0.75,0.625]<p>table</p>[0.0,0.125,1,0.875]",
        [("cup", None, [[320.0, 240.0, 480.0, 320.0]]), ("table", None, [[0.0, 0.0, 640.0, 480.0]])],
    ),
    (
        "relation",
        TALL,
        "<p>a</p>[0.300,0.100,0.400,0.200] <p>b</p>[0.300,0.100,0.400,0.200;0.500,0.100,0.600,0.200]",
        [
            ("a", None, [[50.3, 50.1, 100.4, 100.2]]),
            ("b", None, [[50.3, 50.1, 100.4, 100.2], [150.5, 50.1, 200.6, 100.2]]),
        ],
    ),
    (
        "grounded_caption",
        SQUARE,
        "<p>A man</p>[0.100,0.100,0.200,0.200] rides <p>horses</p>[0.0,0.5,0.4,1.0;0.5,0.5,0.9,1.0].",
        [
            ("A man", 0, [[100.0, 100.0, 200.0, 200.0]]),
            ("horses", 12, [[0.0, 500.0, 400.0, 1000.0], [500.0, 500.0, 900.0, 1000.0]]),
        ],
    ),
    ("grounded_caption", WIDE, "Nothing [see 1] here.", []),
    (
        "grounded_caption",
        TALL,
        r"The sign <p><\p> [\0.5,0.5]</p>[0.400,0.000,0.600,1.000][1]",
        [("<p> [0.5,0.5]", 9, [[100.4, 0.0, 200.6, 501.0]])],
    ),
    (
        "detection",
        SQUARE,
        "<p>dog</p>[0.1,0.1,0.2,0.2;0.3,0.3,0.4,0.4]",
        [("dog", None, [[100.0, 100.0, 200.0, 200.0], [300.0, 300.0, 400.0, 400.0]])],
    ),
    (
        "detection",
        WIDE,
        "<p>traffic light</p>[0.125,0.250,0.500,0.750]",
        [("traffic light", None, [[80.0, 80.0, 320.0, 400.0]])],
    ),
    ("detection", TALL, "<p>zebra</p>[]", [("zebra", None, [])]),
    (
        "layout",
        SQUARE,
        "<p>text</p>[0.1,0.1,0.2,0.2;0.1,0.3,0.2,0.4] <p>figure</p>[0.5,0.5,0.6,0.6]",
        [
            ("text", None, [[100.0, 100.0, 200.0, 200.0], [100.0, 300.0, 200.0, 400.0]]),
            ("figure", None, [[500.0, 500.0, 600.0, 600.0]]),
        ],
    ),
    ("layout", WIDE, "<p>title</p>[0.125,0.250,0.500,0.750]", [("title", None, [[80.0, 80.0, 320.0, 400.0]])]),
    ("layout", TALL, "<p>table</p>[0.400,0.000,0.600,1.000]", [("table", None, [[100.4, 0.0, 200.6, 501.0]])]),
    (
        "text_detection",
        SQUARE,
        "<p>EXIT</p>[0.1,0.1,0.2,0.2] <p>EXIT</p>[0.3,0.3,0.4,0.4]",
        [("EXIT", None, [[100.0, 100.0, 200.0, 200.0]]), ("EXIT", None, [[300.0, 300.0, 400.0, 400.0]])],
    ),
    (
        "text_detection",
        WIDE,
        "<p>50% [off]; now</p>[0.125,0.250,0.500,0.750]",
        [("50% [off]; now", None, [[80.0, 80.0, 320.0, 400.0]])],
    ),
    ("text_detection", TALL, "<p>出口</p>[0.400,0.000,0.600,1.000]", [("出口", None, [[100.4, 0.0, 200.6, 501.0]])]),
    ("pose", SQUARE, "<p>nose</p>[0.123,0.456]", [{"nose": [123.0, 456.0]}]),
    (
        "pose",
        WIDE,
        "<p>nose</p>[0.500,0.250] <p>left_eye</p>[0.250,0.500]",
        [{"nose": [320.0, 80.0], "left_eye": [160.0, 240.0]}],
    ),
    ("pose", TALL, "<p>right_ankle</p>[0.300,0.900]", [{"right_ankle": [50.3, 450.9]}]),
]


@pytest.mark.parametrize(("name", "geometry", "text", "expected"), ANSWERS)
def test_hand_written_answers(name: str, geometry: ImageGeometry, text: str, expected: list[Any]) -> None:
    result = tasks.create(name).parse(text, geometry)
    assert result.errors == ()
    assert close([numbers(item) for item in result.items], expected), result.items


def test_every_task_has_three() -> None:
    assert {name: sum(row[0] == name for row in ANSWERS) for name in tasks.names()} == dict.fromkeys(tasks.names(), 3)


def test_plain_text_of_a_grounded_caption() -> None:
    result = tasks.create("grounded_caption").parse(" <p>A man</p>[0.1,0.1,0.2,0.2] is [1] here.\n", SQUARE)
    assert result.text == "A man is [1] here."
    assert result.items[0].start == 0


BOX = Box(64.0, 10.0, 320.0, 170.0)  # in WIDE: 0.1, 90/640, 0.5, 250/640

WRITTEN: list[tuple[str, Any, str, str]] = [
    (
        "vqa",
        tasks.QuestionSample("What is it?", "dog"),
        "What is it?\nAnswer the question using a single word or phrase.",
        "dog",
    ),
    (
        "vizwiz",
        tasks.QuestionSample("What is it?", "Unanswerable"),
        "What is it? When the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
        "Unanswerable",
    ),
    (
        "multiple_choice",
        tasks.MultipleChoiceSample("How is the light?", ("High", "Low"), 1),
        "Question:\nHow is the light?\nChoices:\nA. High\nB. Low\n"
        "Answer with the option's letter from the given choices directly.",
        "B",
    ),
    (
        "multiple_choice",
        tasks.MultipleChoiceSample("How?", ("High", "Low"), 0, context="Read this."),
        "Context:\nRead this.\nQuestion:\nHow?\nChoices:\nA. High\nB. Low\n"
        "Answer with the option's letter from the given choices directly.",
        "A",
    ),
    ("detailed_caption", tasks.CaptionSample("Words."), "Generate a detailed description about the image.", "Words."),
    ("caption", tasks.CaptionSample("Words."), "Provide a one-sentence caption for the provided image.", "Words."),
    (
        "rec",
        tasks.RegionSample("man in red", BOX, WIDE),
        "Please provide the bounding box coordinate of the region this sentence describes: man in red.",
        "[0.100,0.141,0.500,0.391]",
    ),
    (
        "relation",
        tasks.RelationSample(GroundedPhrase("man", (BOX,)), "rides", GroundedPhrase("horse", (BOX,)), WIDE),
        "Please provide the bounding box coordinate of the region this sentence describes : man rides horse.",
        "<p>man</p>[0.100,0.141,0.500,0.391] <p>horse</p>[0.100,0.141,0.500,0.391]",
    ),
    (
        "reg",
        tasks.RegionSample("man in red", BOX, WIDE),
        "Please provide a short description for this region: [0.100,0.141,0.500,0.391].",
        "man in red",
    ),
    (
        "grounded_caption",
        tasks.GroundedCaptionSample("A man.", (GroundedPhrase("man", (BOX, BOX), 2),), WIDE),
        "Describe the image concisely. Include the bounding box for each mentioned object.",
        "A <p>man</p>[0.100,0.141,0.500,0.391;0.100,0.141,0.500,0.391].",
    ),
    (
        "detection",
        tasks.DetectionSample("dog", (BOX,), WIDE),
        "Detect all dog shown in the image.",
        "<p>dog</p>[0.100,0.141,0.500,0.391]",
    ),
    (
        "layout",
        tasks.LayoutSample({"table": (BOX,), "text": (BOX,), "list": ()}, WIDE),
        "Detect all text, title, list, table and figure shown in the image.",
        "<p>text</p>[0.100,0.141,0.500,0.391] <p>table</p>[0.100,0.141,0.500,0.391]",
    ),
    (
        "text_detection",
        tasks.TextDetectionSample((GroundedPhrase("<p>", (BOX,)),), WIDE),
        "Please detect all texts and provide their bounding box coordinate.",
        r"<p><\p></p>[0.100,0.141,0.500,0.391]",
    ),
    (
        "pose",
        tasks.PoseSample(Keypoints({"left_eye": Point(0.0, 0.0), "nose": Point(640.0, 480.0)}), BOX, WIDE),
        "Detect the key points of the person in the region [0.100,0.141,0.500,0.391].",
        "<p>nose</p>[1.000,0.875] <p>left_eye</p>[0.000,0.125]",
    ),
    ("chart", tasks.ChartSample("a | b"), "Convert this chart to a table.", "a | b"),
    ("classification", tasks.ClassificationSample("tabby cat"), "Classify the image.", "This is a tabby cat."),
]


@pytest.mark.parametrize(("name", "sample", "instruction", "answer"), WRITTEN)
def test_hand_written_examples(name: str, sample: Any, instruction: str, answer: str) -> None:
    assert tasks.create(name).format(sample) == tasks.Example(instruction, answer)


def test_every_default_wording_is_pinned() -> None:
    assert {row[0] for row in WRITTEN} == set(tasks.names())
