from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.generation import Sampling
from sphinxkit.geometry import Box, ImageGeometry
from sphinxkit.integrations.demo.talk import FieldError, Form, Reply, Talk, add_corner, enlarge, form_fields
from sphinxkit.sphinx_model import ChatSession, SphinxModel

SHORT = Sampling(max_new_tokens=4)
SIZE = ImageGeometry(200, 100)


def ask(talk: Talk, *fields: Any, **more: Any) -> Reply:
    return list(talk.ask(Form(*fields, **more)))[-1]


def answer_with(monkeypatch: pytest.MonkeyPatch, *pieces: str, confidence: float | None = None) -> None:
    def stream(self: ChatSession, *question: Any) -> Iterator[str]:
        yield from pieces
        self.confidence = confidence

    monkeypatch.setattr(ChatSession, "stream", stream)


def test_a_talk_answers_as_the_model_does(model: SphinxModel, red: Path, tmp_path: Path) -> None:
    talk = Talk(model, SHORT)
    blue = tmp_path / "blue.png"
    Image.new("RGB", (200, 100), "blue").save(blue)
    question = [{"role": "user", "content": "What is it?"}]
    replies = list(talk.ask(Form(red, None, " What is it? ")))
    first = replies[-1]
    assert (first.asked, first.text) == ("What is it?", model.chat(question, red, max_new_tokens=4))
    assert all(first.text.startswith(reply.text) and not reply.notes for reply in replies[:-1])
    assert talk.replies == [first]
    assert ask(talk, red, None, "What is it?").text == first.text  # the first question is forgotten
    said = [*question, {"role": "assistant", "content": first.text or "(no answer)"}]
    longer = ask(talk, red, None, "And now?", keeps_history=True)
    assert longer.text == model.chat([*said, {"role": "user", "content": "And now?"}], red, max_new_tokens=4)
    other = ask(talk, blue, None, "What is it?", keeps_history=True)  # another picture, another talk
    assert other.text == model.chat(question, blue, max_new_tokens=4)
    assert talk.replies == [other]
    assert ask(talk, None, None, "What is it?").drawing is None


def test_an_answer_grows(model: SphinxModel, red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, " a", " b", "c ", confidence=-0.5)
    texts = [reply.text for reply in Talk(model).ask(Form(red, None, "What?"))]
    assert texts == ["a", "a b", "a bc", "a bc"]


def test_a_task_is_drawn(model: SphinxModel, red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "[0.250,0.500,", "0.500,0.750]")
    reply = ask(Talk(model), red, "rec", "the dog")
    assert reply.asked.endswith("describes: the dog.")
    assert reply.notes == ("1 box drawn",)
    with Image.open(red) as before:
        assert reply.drawing is not None
        assert reply.drawing.size == (600, 300)  # the box's pixels are three times as large
        # the square is 200 wide with 50 above the picture: the box is (50, 50, 100, 100), its label above it
        changed = ImageChops.difference(enlarge(before), reply.drawing).getbbox()
    assert changed is not None
    assert (changed[0], changed[2], changed[3]) == (150, 300, 300)
    reply = ask(Talk(model), red, "pose", region="0,0,100,100")
    assert reply.asked == tasks.create("pose").prompt(box=Box(0, 0, 100, 100), geometry=SIZE)
    assert reply.notes == ("not read: '[0.250,0.500,0.500,0.750]' (a list of numbers without a phrase)",)
    assert reply.drawing is None
    whole = ask(Talk(model), red, "pose", region=" ")
    assert whole.asked == tasks.create("pose").prompt(box=Box(0, 0, 200, 100), geometry=SIZE)


def test_how_sure_it_is(model: SphinxModel, red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "red", confidence=math.log(0.5))
    reply = ask(Talk(model), red, "vqa", "What color?")
    assert reply.notes == ("confidence -0.69 (50% a token)",)
    assert reply.warning is None
    assert model.conversation is not None
    monkeypatch.setattr(type(model.conversation), "low_confidence", -0.6)
    warned = ask(Talk(model), red, "vqa", "What color?")
    assert warned.warning is not None
    assert warned.warning.startswith("low confidence (-0.69, usual are -0.60 and above)")
    seen: list[tuple[int, int]] = []
    unknown = Talk(model, picture_note=lambda picture: seen.append(picture.size) or "unknown kind")  # type: ignore[func-returns-value]
    assert ask(unknown, red, "vqa", "What color?").warning == f"unknown kind; {warned.warning}"
    ask(unknown, red, "vqa", "What shape?")
    assert seen == [(200, 100)]  # once a picture
    assert ask(unknown, None, None, "What?").warning == warned.warning


def test_choices_are_lettered(model: SphinxModel, red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "B")
    reply = ask(Talk(model), red, "multiple_choice", "Which?", choices="one\n\n two \n")
    assert "A. one\nB. two\n" in reply.asked


@pytest.mark.parametrize(
    ("question", "field", "message"),
    [
        (Form(None, None, " "), "words", "Type a question."),
        (Form(None, "rec", "the dog"), "picture", "This task is about a picture: choose one"),
        (Form(Path("red.png"), "rec", " "), "words", "This task asks about a phrase: type one."),
        (Form(Path("red.png"), "multiple_choice", "Which?", choices="one"), "choices", "two choices or more"),
        (Form(Path("red.png"), "pose", region="1,2"), "region", "region '1,2': expected X1,Y1,X2,Y2"),
        (Form(Path("red.png"), "pose", region="500,0,600,9"), "region", "lies outside the image of 200x100"),
        (Form(Path("no.png"), None, "What?"), "picture", "was deleted, as all are in time"),
        (Form(Path("text.png"), None, "What?"), "picture", "^image text.png: not an image in a format"),
        (
            Form(Path("large.png"), None, "What?"),
            "picture",
            "30000x1000 pixels are more than the limit of 25000000",
        ),
    ],
)
def test_errors_name_their_field(
    model: SphinxModel, red: Path, question: Form, field: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(red.parent)
    Path("text.png").write_text("no picture")
    Image.new("1", (30_000, 1_000)).save("large.png")  # ten kilobytes that would be gigabytes
    with pytest.raises(FieldError, match=message) as caught:
        list(Talk(model, SHORT).ask(question))
    assert caught.value.field == field


def test_a_private_folder_is_not_told(model: SphinxModel, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(DataError) as caught:
        ask(Talk(model), path, None, "What?")
    assert str(tmp_path) not in str(caught.value)


def test_fields_of_tasks() -> None:
    def shown(task: str | None) -> tuple[str, bool, bool]:
        takes = form_fields(task)
        return takes.words, takes.has_choices, takes.has_region

    assert shown(None) == ("question", False, False)
    assert shown("rec") == ("phrase", False, False)
    assert shown("multiple_choice") == ("question", True, False)
    assert shown("pose") == ("", False, True)
    assert shown("layout") == ("", False, False)


def test_two_clicks_make_a_region() -> None:
    first = add_corner("", 40, 10)
    assert first == "40,10"
    assert add_corner(first, 5, 60) == "5,10,40,60"
    assert add_corner("5,10,40,60", 7, 8) == "7,8"
    assert add_corner("nonsense", 7.5, 8) == "7.5,8"
