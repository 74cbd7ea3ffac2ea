from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import DataError, RegistryError
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.questions import make_question, text_fields
from sphinxkit.geometry import Box, ImageGeometry

IMAGE = ImageGeometry(640, 480)


def test_fields_of_every_task() -> None:
    found = {name: text_fields(tasks.create(name)) for name in tasks.names()}
    assert {name: fields for name, fields in found.items() if fields} == {
        "vqa": ("question",),
        "vizwiz": ("question",),
        "multiple_choice": ("question",),
        "rec": ("phrase",),
        "relation": ("phrase",),
        "detection": ("category",),
    }


def test_the_answer_is_read_in_pixels_of_the_image() -> None:
    question = make_question("rec", IMAGE, phrase="the cup")
    assert question.label == "the cup"
    assert question.text.endswith("describes: the cup.")
    assert question.parse("[0.125,0.250,0.500,0.750]").items == (Box(80.0, 80.0, 320.0, 400.0),)


def test_a_region_is_the_whole_image_unless_given() -> None:
    assert make_question("pose", IMAGE).text.endswith("in the region [0.000,0.125,1.000,0.875].")
    assert make_question("pose", IMAGE, box=Box(64, 10, 320, 170)).text.endswith("[0.100,0.141,0.500,0.391].")


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("rec", {}, "task 'rec': it asks about a phrase; give phrase= a text"),
        ("rec", {"phrase": 3}, "task 'rec': it asks about a phrase; give phrase= a text"),
        ("rec", {"phrase": "x", "box": None}, "there is no field 'box'; it takes phrase, wording"),
        ("caption", {"phrase": "x"}, "there is no field 'phrase'; it takes wording"),
    ],
)
def test_wrong_fields(task: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_question(task, IMAGE, **fields)


def test_unknown_task() -> None:
    with pytest.raises(RegistryError, match="unknown task 'rce'"):
        make_question("rce", IMAGE)
