from __future__ import annotations

import numpy as np
import pytest

from sphinxkit import nano
from sphinxkit.formatters.tasks import TaskQuestion, make_question
from sphinxkit.geometry import ImageGeometry
from sphinxkit.nano.examples import examples
from sphinxkit.nano.world import World


def test_every_example_is_a_question_about_an_unseen_picture() -> None:
    shown = examples()
    assert len({example.task for example in shown}) == len(shown) == 8
    for task, picture, fields in shown:
        assert picture.shape == (336, 448, 3)
        assert isinstance(make_question(task, ImageGeometry(448, 336), **fields), TaskQuestion)
    assert World("synthetic", "val").style.split == "val"
    assert all(np.array_equal(one.picture, two.picture) for one, two in zip(shown, examples(), strict=True))


@pytest.mark.slow
def test_nano_answers_its_examples_as_they_were_drawn() -> None:
    """Words exactly; boxes that overlap the drawn ones by half."""
    model = nano.load()
    answers = {task: model.ask(task, picture, **fields) for task, picture, fields in examples()}
    world = World("synthetic", "val", size=(448, 336))
    assert answers["vqa"].text == "star"
    assert answers["chart"].text == "SUM | 20\nLEK | 15\nWYM | 4"
    [box], [told] = [s.box for s in world.samples(6, "rec")[:1]], answers["rec"].items
    assert told.iou(box) >= 0.5
    [words], drawn = answers["text_detection"].items[:1], world.samples(3, "text_detection")[0].texts
    assert words.phrase == drawn[0].phrase
    assert words.boxes[0].iou(drawn[0].boxes[0]) >= 0.5
