"""Samples that cannot be written down, names, wordings and facts."""

from __future__ import annotations

import math
import string
from typing import Any

import pytest

from sphinxkit.errors import DataError, RegistryError
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints, Task
from sphinxkit.geometry import Box, ImageGeometry, Point

IMAGE = ImageGeometry(640, 480)
BOX = Box(0.0, 0.0, 64.0, 64.0)
MAN = GroundedPhrase("man", (BOX,))


def test_the_tasks() -> None:
    assert tasks.names() == sorted(
        [
            *("vqa", "vizwiz", "multiple_choice", "detailed_caption", "caption", "rec", "relation", "reg", "pose"),
            *("grounded_caption", "detection", "layout", "text_detection", "chart", "classification"),
        ]
    )
    with pytest.raises(RegistryError, match="unknown task 'classify'; did you mean 'classification'"):
        tasks.create("classify")


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_describes_itself(name: str) -> None:
    task = tasks.create(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.metric
    assert len(set(task.wordings)) == len(task.wordings) >= 2
    fields = [{field for _, field, _, _ in string.Formatter().parse(w) if field} for w in task.wordings]
    assert all(found == fields[0] for found in fields)
    with pytest.raises(DataError, match=f"task '{name}': wording 9 does not exist, there are {len(task.wordings)}"):
        task.instruction(9)
    with pytest.raises(DataError, match="wording -1 does not exist"):
        task.instruction(-1)


def test_default_wordings_differ() -> None:
    defaults = [tasks.create(name).wordings[0] for name in tasks.names()]
    assert len(set(defaults)) == len(defaults)


def test_other_wordings() -> None:
    sample = tasks.RegionSample("it", BOX, IMAGE)
    assert tasks.create("rec").format(sample, wording=2).instruction == "Give the bounding box of it."
    assert tasks.create("rec").prompt("the {x} one") == (
        "Please provide the bounding box coordinate of the region this sentence describes: the {x} one."
    )


def test_prompt_of_a_question_with_its_choices_in_it() -> None:
    question = "Question:\nHow?\nChoices:\nA. x\nB. y"
    assert tasks.create("multiple_choice").prompt(question) == (
        f"{question}\nAnswer with the option's letter from the given choices directly."
    )


def test_facts() -> None:
    assert len(tasks.COCO_KEYPOINTS) == len(set(tasks.COCO_KEYPOINTS)) == 17
    assert len(tasks.PUBLAYNET_CLASSES) == 5
    assert len(tasks.DOCLAYNET_CLASSES) == 11
    assert tasks.create("layout", classes="doclaynet").prompt() == (
        "Detect all Caption, Footnote, Formula, List-item, Page-footer, Page-header, Picture, Section-header, Table, "
        "Text and Title shown in the image."
    )
    assert tasks.create("layout", classes=["page"]).prompt() == "Detect all page shown in the image."


def caption(text: str, *phrases: GroundedPhrase) -> tasks.GroundedCaptionSample:
    return tasks.GroundedCaptionSample(text, phrases, IMAGE)


@pytest.mark.parametrize(
    ("name", "sample", "message"),
    [
        ("vqa", tasks.QuestionSample(" ", "x"), "task 'vqa': the question is empty"),
        ("vizwiz", tasks.QuestionSample("x", "\n"), "task 'vizwiz': the answer is empty"),
        ("caption", tasks.CaptionSample(""), "the caption is empty"),
        ("detailed_caption", tasks.CaptionSample(""), "'detailed_caption': the caption is empty"),
        ("chart", tasks.ChartSample(" "), "the table is empty"),
        ("classification", tasks.ClassificationSample(" "), "the label is empty"),
        ("multiple_choice", tasks.MultipleChoiceSample("", ("a",), 0), "the question is empty"),
        ("multiple_choice", tasks.MultipleChoiceSample("q", ("a", ""), 0), "the choice is empty"),
        ("multiple_choice", tasks.MultipleChoiceSample("q", ("a",) * 27, 0), "27 choices, at most 26 have a letter"),
        ("multiple_choice", tasks.MultipleChoiceSample("q", ("a",), 1), "answer 1 is none of 1 choices"),
        ("multiple_choice", tasks.MultipleChoiceSample("q", (), 0), "answer 0 is none of 0 choices"),
        ("rec", tasks.RegionSample("", BOX, IMAGE), "the phrase is empty"),
        ("rec", tasks.RegionSample("x", Box(0, 0, 642, 1), IMAGE), "lies outside the image of 640x480"),
        ("rec", tasks.RegionSample("x", Box(0, 0, math.inf, 1), IMAGE), "lies outside the image"),
        ("reg", tasks.RegionSample("", BOX, IMAGE), "'reg': the phrase is empty"),
        ("reg", tasks.RegionSample("x", Box(0, -2, 1, 1), IMAGE), "lies outside the image"),
        ("relation", tasks.RelationSample(MAN, "", MAN, IMAGE), "the predicate is empty"),
        ("relation", tasks.RelationSample(MAN, "on", GroundedPhrase("x", ()), IMAGE), "'x' has no box"),
        ("relation", tasks.RelationSample(GroundedPhrase(" ", (BOX,)), "on", MAN, IMAGE), "a phrase is empty"),
        ("grounded_caption", caption(""), "the caption is empty or has white space around it: ''"),
        ("grounded_caption", caption(" man"), "white space around it: ' man'"),
        ("grounded_caption", caption("a man", MAN), "'man' is not at None of 'a man', or overlaps"),
        ("grounded_caption", caption("a man", GroundedPhrase("man", (BOX,), 1)), "'man' is not at 1 of 'a man'"),
        ("grounded_caption", caption("man", *[GroundedPhrase("man", (BOX,), 0)] * 2), "or overlaps"),
        ("grounded_caption", caption("man", GroundedPhrase("man", (), 0)), "'man' has no box"),
        ("detection", tasks.DetectionSample("", (BOX,), IMAGE), "the category is empty"),
        ("text_detection", tasks.TextDetectionSample((), IMAGE), "there is no text"),
        ("text_detection", tasks.TextDetectionSample((GroundedPhrase("x", ()),), IMAGE), "'x' has no box"),
        ("layout", tasks.LayoutSample({"page": (BOX,)}, IMAGE), "class 'page' is unknown; the classes are"),
        ("layout", tasks.LayoutSample({"text": ()}, IMAGE), "the page has no part"),
        ("pose", tasks.PoseSample(Keypoints({}), BOX, IMAGE), r"no key points, or not COCO's: \[\]"),
        ("pose", tasks.PoseSample(Keypoints({"tail": Point(1, 1)}), BOX, IMAGE), r"not COCO's: \['tail'\]"),
        ("pose", tasks.PoseSample(Keypoints({"nose": Point(-3, 1)}), BOX, IMAGE), "lies outside the image"),
    ],
)
def test_samples_that_cannot_be_written(name: str, sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tasks.create(name).format(sample)


def test_classes_of_a_layout() -> None:
    with pytest.raises(DataError, match="classes 'docbank', expected a list or one of"):
        tasks.create("layout", classes="docbank")
    with pytest.raises(DataError, match="classes must be named and different, got"):
        tasks.create("layout", classes=["List-item", "list item"])
    with pytest.raises(DataError, match="classes must be named and different"):
        tasks.create("layout", classes=[])


def test_a_box_a_little_outside_is_clipped() -> None:
    sample = tasks.RegionSample("x", Box(-0.4, 0.0, 640.9, 480.0), IMAGE)
    assert tasks.create("rec").format(sample).answer == "[0.000,0.125,1.000,0.875]"
    assert tasks.create("rec").items(sample) == (Box(0.0, 0.0, 640.0, 480.0),)
