"""The page is tried with gradio itself by hand; here its parts, and what it tells gradio."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from PIL import Image, ImageChops
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.cli.demo import FREE, Talk, add_corner, import_gradio, make_page, trusted_hosts
from sphinxkit.cli.options import AnswerOptions
from sphinxkit.errors import DataError
from sphinxkit.sphinx_model import ChatSession, SphinxModel

SHORT = AnswerOptions(max_new_tokens=4)


@pytest.fixture(scope="module")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        Image.new("RGB", (200, 100), path.stem).save(path)
    return paths


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DataError, match=r'the demo needs gradio: pip install "sphinxkit\[demo\]"'):
        CliRunner().invoke(app, ["demo"], catch_exceptions=False)


def test_a_talk_answers_as_the_model_does(model: SphinxModel, pictures: list[Path]) -> None:
    talk = Talk(model, SHORT)
    red, blue = pictures
    question = [{"role": "user", "content": "What is it?"}]
    first = talk.ask(red, None, " What is it? ", "", keeps_history=False)
    assert (first.asked, first.text) == ("What is it?", model.chat(question, red, max_new_tokens=4))
    assert first.drawing is not None
    assert re.fullmatch(r"nothing drawn; confidence -\d+\.\d\d", first.notes)
    again = talk.ask(red, None, "What is it?", "", keeps_history=False)
    assert again.text == first.text  # the first question is forgotten
    said = [*question, {"role": "assistant", "content": first.text or "(no answer)"}]
    longer = talk.ask(red, None, "And now?", "", keeps_history=True)
    assert longer.text == model.chat([*said, {"role": "user", "content": "And now?"}], red, max_new_tokens=4)
    other = talk.ask(blue, None, "What is it?", "", keeps_history=True)  # another picture, another talk
    assert other.text == model.chat(question, blue, max_new_tokens=4)
    assert talk.ask(None, None, "What is it?", "", keeps_history=True).drawing is None


def test_a_task_is_drawn(model: SphinxModel, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatSession, "ask", lambda self, question, *how: "[0.250,0.500,0.500,0.750]")
    reply = Talk(model, SHORT).ask(pictures[0], "rec", "the dog", "", keeps_history=False)
    assert reply.asked.endswith("describes: the dog.")
    assert reply.notes == "1 box drawn"
    with Image.open(pictures[0]) as before:
        assert reply.drawing is not None
        assert ImageChops.difference(before, reply.drawing).getbbox() is not None
    reply = Talk(model, SHORT).ask(pictures[0], "pose", "", "0,0,100,100", keeps_history=False)
    assert reply.notes.startswith("nothing drawn; not read: ")


def test_wrong_questions(model: SphinxModel, tmp_path: Path) -> None:
    talk = Talk(model, SHORT)
    with pytest.raises(DataError, match="there is no question"):
        talk.ask(None, None, " ", "", keeps_history=False)
    with pytest.raises(DataError, match="task 'rec' is about a picture: give one"):
        talk.ask(None, "rec", "the dog", "", keeps_history=False)
    with pytest.raises(DataError, match="there is no such file"):
        talk.ask(tmp_path / "no.png", None, "What?", "", keeps_history=False)


def test_two_clicks_make_a_region() -> None:
    first = add_corner("", 40, 10)
    assert first == "40,10"
    assert add_corner(first, 5, 60) == "5,10,40,60"
    assert add_corner("5,10,40,60", 7, 8) == "7,8"
    assert add_corner("nonsense", 7.5, 8) == "7.5,8"


def test_the_page(model: SphinxModel, pictures: list[Path]) -> None:
    class Shown(Exception):
        def __init__(self, message: str, print_exception: bool) -> None:
            super().__init__(message)

    gradio = MagicMock(Error=Shown)
    make_page(gradio, model, SHORT)
    respond = gradio.Button.return_value.click.call_args.args[0]
    talk, messages, drawing, notes = respond(None, [], str(pictures[0]), FREE, "What?", "", False)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert drawing.size == (200, 100)
    assert notes.startswith("nothing drawn; confidence -")
    assert respond(talk, messages, str(pictures[0]), FREE, "Why?", "", False)[0] is talk
    *_, notes = respond(None, messages, str(pictures[0]), FREE, "Why?", "", False)  # evicted in the meantime
    assert notes.startswith("the earlier conversation was closed")
    with pytest.raises(Shown, match="it asks about a phrase"):
        respond(None, [], str(pictures[0]), "rec", "", "", False)
    click = gradio.Image.return_value.select.call_args.args[0]
    assert click.__annotations__["event"] is gradio.SelectData
    assert click("", MagicMock(index=[3, 4])) == "3,4"


def test_a_picture_of_too_many_pixels(model: SphinxModel, tmp_path: Path) -> None:
    """Ten kilobytes that would be gigabytes."""
    path = tmp_path / "large.png"
    Image.new("1", (30_000, 1_000)).save(path)
    with pytest.raises(DataError, match="30000x1000 pixels are more than the limit of 25000000"):
        Talk(model, SHORT).ask(path, None, "What is it?", "", keeps_history=False)


def test_hosts_that_are_trusted() -> None:
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse("here"))], middleware=trusted_hosts("127.0.0.1")
    )
    client = TestClient(app)
    for host in ("127.0.0.1:7860", "localhost"):
        assert client.get("/", headers={"host": host}).text == "here"
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert trusted_hosts("192.0.2.1") == []


@pytest.mark.usefixtures("embedded")
def test_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sphinxkit.cli.demo"], "trusted_hosts", lambda host: [])
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    gradio = MagicMock()
    page = gradio.Blocks.return_value.__enter__.return_value
    page.launch.return_value = (None, "http://127.0.0.1:8000/", None)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    assert import_gradio() is gradio
    arguments = ["demo", "--port", "8000", "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.stdout == "http://127.0.0.1:8000/ (Ctrl-C ends)\n"
    assert page.launch.call_args.kwargs["server_port"] == 8000
    assert page.launch.call_args.kwargs["server_name"] == "127.0.0.1"
    assert page.launch.call_args.kwargs["share"] is False
    assert page.launch.call_args.kwargs["max_file_size"] == "20mb"
    assert os.environ["GRADIO_TEMP_DIR"].startswith(tempfile.gettempdir())
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()  # gone with the demo
    page.launch.side_effect = OSError("in use")
    with pytest.raises(DataError, match=r"--host 127\.0\.0\.1 --port 8000: cannot listen there: in use"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
