"""A task's question, its answer read; with answers put into the model's mouth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sphinxkit.errors import DataError, RegistryError
from sphinxkit.formatters import tasks
from sphinxkit.generation import Generation
from sphinxkit.geometry import Box, ImageGeometry
from sphinxkit.sphinx_model import SphinxModel

GEOMETRY = ImageGeometry(200, 100)  # the padded square is 200 wide, the picture begins 50 below its top


@pytest.fixture
def said(model: SphinxModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model saw; it answers with a box."""
    prompts: list[str] = []

    def generate(texts, images, **options):
        prompts.extend(texts)
        return [Generation(" [0.250,0.500,0.500,0.750]", [5], "stop")]

    monkeypatch.setattr(model, "generate", generate)
    return prompts


def test_a_box_in_pixels(model: SphinxModel, said: list[str], tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 100))
    image.save(tmp_path / "a.png")
    for form in (image, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        answer = model.ask("rec", form, phrase="the red circle")
        # by hand: x 0.25..0.5 of 200 is 50..100; y 0.5..0.75 of 200 is 100..150, less 50 of padding: 50..100
        assert answer.items == (Box(50, 50, 100, 100),)
        assert answer.text == "[0.250,0.500,0.500,0.750]"
        assert answer.failures == ()
        assert answer.question.label == "the red circle"
        assert said[-1] == answer.prompt
        assert tasks.create("rec").prompt("the red circle") in answer.prompt


def test_a_question_that_is_worded_already(model: SphinxModel, said: list[str]) -> None:
    question = tasks.make_question("pose", GEOMETRY, box=Box(50, 0, 100, 100))
    answer = model.ask(question, Image.new("RGB", (200, 100)))
    assert "in the region [0.250,0.250,0.500,0.750]." in said[-1]
    assert answer.question is question
    whole = tasks.make_question("pose", GEOMETRY)
    assert "in the region [0.000,0.250,1.000,0.750]." in whole.text


def test_a_task_that_begins_the_answer(model: SphinxModel, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.VQA, "answer_start", "The answer is")
    model.ask("vqa", Image.new("RGB", (20, 10)), question="How many?")
    assert said[-1].endswith("### Assistant: The answer is")


def test_a_session_takes_tasks_questions(model: SphinxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.VQA, "answer_start", "The answer is")
    question = tasks.make_question("vqa", GEOMETRY, question="How many?")
    session = model.session()
    answer = session.ask(question, max_new_tokens=4)
    prompt, stop = model.chat_prompt(question.text, "The answer is")
    assert answer == model.generate(prompt, max_new_tokens=4, stop=stop)[0].text.strip()
    assert session.messages[0]["content"] == question.text
    assert session.messages[1]["content"] == f"The answer is {answer}".strip()
    messages = [*session.messages, {"role": "user", "content": "Why?"}]
    assert session.ask("Why?", max_new_tokens=4) == model.chat(messages, max_new_tokens=4)


@pytest.mark.parametrize(
    ("task", "fields", "error", "message"),
    [
        ("pos", {}, RegistryError, "did you mean 'pose'"),
        ("rec", {}, DataError, "task 'rec': it asks about a phrase; give phrase= a text"),
        ("rec", {"phrase": 5}, DataError, "give phrase= a text"),
        ("rec", {"phrase": " "}, DataError, "task 'rec': the phrase is empty"),
        ("rec", {"category": "dog"}, DataError, "there is no field 'category'; it takes phrase, wording"),
        ("caption", {"box": Box(0, 0, 1, 1)}, DataError, "task 'caption': there is no field 'box'; it takes wording"),
        ("pose", {"box": Box(0, 0, 1, 900)}, DataError, "lies outside the image of 200x100"),
    ],
)
def test_wrong_fields(task: str, fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tasks.make_question(task, GEOMETRY, **fields)


def test_pixels_do_not_tell_the_images_size(model: SphinxModel) -> None:
    with pytest.raises(DataError, match="ask: expected an image, got a tensor"):
        model.ask("caption", torch.zeros(3, 512, 512))
    with pytest.raises(DataError, match="the question is worded already, got also phrase="):
        model.ask(tasks.make_question("caption", GEOMETRY), Image.new("RGB", (200, 100)), phrase="a dog")
