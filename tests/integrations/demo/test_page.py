"""What the page tells gradio; ``test_browser`` drives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from PIL import Image

from sphinxkit.formatters import tasks
from sphinxkit.generation import Sampling
from sphinxkit.geometry import Box
from sphinxkit.integrations.demo.page import FIELDS, TITLES, caption_of, form_of, make_page, menu, show_turns
from sphinxkit.integrations.demo.talk import Reply, Talk
from sphinxkit.sphinx_model import SphinxModel

PICTURE = Image.new("RGB", (20, 10), "red")
SKIPPED = object()


@pytest.fixture
def page(model: SphinxModel) -> dict[str, Any]:
    """The functions that the page gives to gradio."""
    gradio = MagicMock(update=dict, skip=lambda: SKIPPED)
    make_page(
        gradio,
        model,
        title="<SPHINX>",
        about="It knows <p>.",
        examples=[("rec", PICTURE, {"phrase": "the dog"})],
        new_talk=lambda: Talk(model, Sampling(max_new_tokens=4)),
    )
    image, gallery = gradio.Image.return_value, gradio.Gallery.return_value
    return {
        "gradio": gradio,
        "respond": gradio.Button.return_value.click.call_args_list[0].kwargs["fn"],
        "show_fields": gradio.Dropdown.return_value.change.call_args.args[0],
        "take_picture": image.upload.call_args.args[0],
        "click": image.select.call_args.args[0],
        "fill": gallery.select.call_args_list[0].args[0],
        "preprocess": image.preprocess,
    }


def shown_errors(updates: list[dict[str, Any]]) -> dict[str, str]:
    assert len(updates) == len(FIELDS)
    return {name: update["value"] for name, update in zip(FIELDS, updates, strict=True) if update["visible"]}


def test_marks_in_texts_are_shown() -> None:
    reply = Reply("Where is <b>?", "<p>dog</p>[0.1] & *x*", None, ("1 box drawn", "not read: '<'"), "low <confidence>")
    shown = show_turns([reply])
    for text in (
        "Where is &lt;b&gt;?",
        "&lt;p&gt;dog&lt;/p&gt;[0.1] &amp; *x*",
        "not read: &#x27;&lt;&#x27;",
        "low &lt;",
    ):
        assert text in shown
    assert show_turns([]) == ""
    assert "earlier conversation was closed" in show_turns([reply], is_new=True)


def test_the_menu_has_every_task_once() -> None:
    shown = menu()
    assert {name for _, name in shown} == {*tasks.names(), ""}
    assert shown[0] == ("Ask a question, get a short answer", "vqa")
    assert shown[-1] == ("Chat in your own words", "")
    assert set(TITLES) <= set(tasks.names())


def test_examples_as_forms() -> None:
    box = Box(1, 2.5, 3, 4)
    assert form_of(("pose", PICTURE, {"box": box})) == ("pose", "", "", "1,2.5,3,4")
    assert form_of(("vqa", PICTURE, {"question": "Why?"})) == ("vqa", "Why?", "", "")
    choice = ("multiple_choice", PICTURE, {"question": "Which?", "choices": ("a", "b"), "context": ""})
    assert form_of(choice) == ("multiple_choice", "Which?", "a\nb", "")
    assert caption_of(choice) == "Which?"
    assert caption_of(("rec", PICTURE, {"phrase": "the dog"})) == "Find one thing: the dog"
    assert caption_of(("layout", PICTURE, {})) == "Find the parts of a page"


def test_an_answer(page: dict[str, Any], red: Path) -> None:
    respond = page["respond"]
    *growing, (talk, log, drawing, *errors) = respond(None, "", str(red), "", "What?", "", "", True)
    assert all(">What?<" in update[1] for update in growing)
    assert ">What?<" in log
    assert "closed" not in log
    assert drawing == {"value": None, "visible": False}
    assert shown_errors(errors) == {}
    *_, (again, longer, *_) = respond(talk, log, str(red), "", "Why?", "", "", True)
    assert again is talk
    assert longer.startswith(log)
    assert longer.count(">Why?<") == 1
    *_, (_, log, *_) = respond(None, longer, str(red), "", "Why?", "", "", True)  # evicted in the meantime
    assert "Your earlier conversation was closed" in log
    assert "What?" not in log


def test_errors_stand_near_their_field(page: dict[str, Any], red: Path) -> None:
    [[talk, log, drawing, *errors]] = page["respond"](None, "", str(red), "rec", "", "", "", False)
    assert isinstance(talk, Talk)
    assert log is drawing is SKIPPED
    assert list(shown_errors(errors)) == ["words"]
    assert "This task asks about a phrase: type one." in shown_errors(errors)["words"]
    long = "What? " * 2000
    *_, [_, _, _, *errors] = page["respond"](None, "", str(red), "", long, "", "", False)
    assert "the conversation" in shown_errors(errors)["question"]


def test_uploads(page: dict[str, Any], red: Path) -> None:
    picture, log, drawing, region, *errors = page["take_picture"](str(red))
    assert (picture, log, drawing, region) == (str(red), "", {"value": None, "visible": False}, "")
    assert shown_errors(errors) == {}
    assert page["take_picture"](None)[0] is None
    red.write_text("<script>")
    picture, *_ = updates = page["take_picture"](str(red))
    assert picture is None
    assert "image red.png: not an image" in shown_errors(updates[4:])["picture"]
    assert "<script>" not in shown_errors(updates[4:])["picture"]
    assert page["preprocess"](MagicMock(path="a.png")) == "a.png"
    assert page["preprocess"](None) is None


def test_only_the_fields_of_the_task(page: dict[str, Any]) -> None:
    words, choices, region, keeps, *errors = page["show_fields"]("rec")
    assert words == {"visible": True, "label": "What to find", "placeholder": "the red circle"}
    assert (choices, region, keeps) == ({"visible": False},) * 3
    assert shown_errors(errors) == {}
    shown = [update["visible"] for update in page["show_fields"]("pose")[:4]]
    assert shown == [False, False, True, False]
    assert [update["visible"] for update in page["show_fields"]("")[:4]] == [True, False, False, True]


def test_clicks(page: dict[str, Any]) -> None:
    for name in ("click", "fill"):
        assert page[name].__annotations__["event"] is page["gradio"].SelectData
    assert page["click"]("", MagicMock(index=[3, 4])) == "3,4"
    picture, *form = page["fill"](MagicMock(index=0))
    assert picture.size == (20, 10)
    assert form == ["rec", "the dog", "", "", "", {"value": None, "visible": False}]
    titles = page["gradio"].HTML.call_args_list[0].args[0]
    assert titles.startswith("<h1>&lt;SPHINX&gt;</h1><p>It knows &lt;p&gt;.</p>")
