"""``sphinxkit generate --task`` and ``--draw``, with answers put into the model's mouth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image, ImageChops
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.cli.task_options import read_task
from sphinxkit.errors import DataError, RegistryError
from sphinxkit.formatters import create, tasks
from sphinxkit.formatters.draw import check_target, count_places, save_drawing
from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints
from sphinxkit.generation import Generation
from sphinxkit.geometry import Box, ImageGeometry, Point
from sphinxkit.sphinx_model import SphinxModel

WHITE = (255, 255, 255)
GEOMETRY = ImageGeometry(200, 100)  # the padded square is 200 wide, the picture begins 50 below its top
Ask = Callable[..., tuple[Result, list[str]]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (200, 100), "white").save(path)
    return path


@pytest.fixture
def ask(embedded: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Ask about the picture and get a given answer; also gives the prompts that the model saw."""
    prompts: list[str] = []

    def run(answer: str, *arguments: str) -> tuple[Result, list[str]]:
        def generate(self: SphinxModel, texts: list[str], images: list[Any], **options: Any) -> list[Generation]:
            prompts.extend(texts)
            return [Generation(answer, [1, 2], "stop")]

        monkeypatch.setattr(SphinxModel, "generate", generate)
        common = ("generate", "-i", str(picture), "--device", "cpu", "--dtype", "float32")
        return CliRunner().invoke(app, [*common, *arguments], catch_exceptions=False), prompts

    return run


def changed(picture: Path, drawn: Path) -> tuple[int, int, int, int] | None:
    with Image.open(picture) as before, Image.open(drawn) as after:
        assert after.size == before.size
        return ImageChops.difference(before, after).getbbox()


def test_a_box_lands_on_the_original_picture(ask: Ask, picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.png"
    # by hand: x 0.25..0.5 of 200 is 50..100; y 0.5..0.75 of 200 is 100..150, less 50 of padding: 50..100
    result, _ = ask("[0.250,0.500,0.500,0.750]", "-p", "Where?", "--draw", str(target))
    assert result.stdout.strip() == "[0.250,0.500,0.500,0.750]"
    assert f"{target}: 1 box drawn" in result.stderr
    assert changed(picture, target) == (50, 50, 100, 100)


def test_a_task_words_the_question_and_reads_the_answer(ask: Ask, picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.png"
    result, prompts = ask(
        " 0.25,0.5,0.5,0.75", *("--task", "rec", "--prompt", "the red circle", "--draw", str(target), "--json")
    )
    [prompt] = prompts
    words = tasks.create("rec").prompt("the red circle")
    assert f"### Human: {words}\n### Assistant:" in prompt
    fields = json.loads(result.stdout)
    box = {"x1": 50.0, "y1": 50.0, "x2": 100.0, "y2": 100.0}
    assert fields["items"] == [{"phrase": "the red circle", "boxes": [box], "start": None}]
    assert fields["unread"] == []
    area = changed(picture, target)
    assert area is not None
    assert area[1] < 50  # what was asked for stands above the box


@pytest.mark.parametrize(
    ("answer", "task", "told"),
    [
        ("<p>circle</p>[0.1,0.3,0.2,0.4;0.5,0.5,0.6,0.6]", ("--task", "detection", "-p", "circle"), "2 boxes drawn"),
        ("A <p>dog</p>[0.1,0.3,0.2,0.4] runs.", ("--task", "grounded_caption"), "1 box drawn"),
        ("<p>EXIT</p>[0.1,0.3,0.2,0.4]", ("--task", "text_detection"), "1 box drawn"),
        ("<p>title</p>[0.1,0.3,0.2,0.4] <p>text</p>[0.1,0.5,0.2,0.6]", ("--task", "layout"), "2 boxes drawn"),
        ("<p>nose</p>[0.500,0.400] <p>left_eye</p>[0.510,0.390]", ("--task", "pose"), "2 points drawn"),
        ("<p>nose</p>[0.500,0.400] <p>dog</p>[0.1,0.3,0.2,0.4]", ("-p", "Where?"), "1 box and 1 point drawn"),
    ],
)
def test_every_kind_of_answer(
    ask: Ask, picture: Path, tmp_path: Path, answer: str, task: tuple[str, ...], told: str
) -> None:
    target = tmp_path / "found.png"
    result, _ = ask(answer, *task, "--draw", str(target))
    assert f"{target}: {told}" in result.stderr
    assert changed(picture, target) is not None


@pytest.mark.parametrize(
    ("answer", "task"),
    [("Two.", ("--task", "vqa", "-p", "How many?")), ("<p>dog</p>[]", ("--task", "detection", "-p", "dog"))],
)
def test_nothing_to_draw(ask: Ask, picture: Path, tmp_path: Path, answer: str, task: tuple[str, ...]) -> None:
    target = tmp_path / "found.png"
    result, _ = ask(answer, *task, "--draw", str(target))
    assert f"{target}: the answer holds nothing to draw, the picture is as it was" in result.stderr
    assert changed(picture, target) is None


def test_what_cannot_be_read_is_told(ask: Ask) -> None:
    result, _ = ask("somewhere", "--task", "rec", "-p", "the dog", "--json")
    assert result.exit_code == 1  # nothing of the answer could be read
    assert "not read: 'somewhere' (no list of numbers where one is due)" in result.stderr
    fields = json.loads(result.stdout)
    assert fields["items"] == []
    assert [fault["kind"] for fault in fields["unread"]] == ["no_coordinates"]


def test_without_a_task_json_has_no_places(ask: Ask) -> None:
    assert "items" not in json.loads(ask("[0.1,0.3,0.2,0.4]", "-p", "Where?", "--json")[0].stdout)


def test_pose_asks_about_a_region(ask: Ask) -> None:
    result, prompts = ask("<p>nose</p>[0.500,0.400]", "--task", "pose", "--box", "50,0,100,100")
    assert "in the region [0.250,0.250,0.500,0.750]." in prompts[-1]
    assert "whole picture" not in result.stderr
    result, prompts = ask("<p>nose</p>[0.500,0.400]", "--task", "pose")
    assert "in the region [0.000,0.250,1.000,0.750]." in prompts[-1]
    assert "no --box: the whole picture" in result.stderr


def test_a_task_that_begins_the_answer(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.VQA, "answer_start", "The answer is")
    assert ask("two", "--task", "vqa", "-p", "How many?")[1][-1].endswith("### Assistant: The answer is")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "a", "--draw", "x.png"], "--task and --draw are about a picture: give --image"),
        (["--task", "pose"], "--task and --draw are about a picture: give --image"),
        (["-p", "a", "-i", "i.png", "--box", "1,2,3,4"], "--box goes with --task"),
        (["--task", "caption", "-i", "i.png", "--raw"], "--task words the prompt"),
        (["--input", "b", "-o", "c", "--task", "pose"], "goes without --image, --task, --box, --draw"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--task", "rec"), DataError, "task 'rec': it asks about a phrase; give one .--prompt"),
        (("--task", "caption", "-p", "dog"), DataError, "task 'caption': it takes no words .--prompt"),
        (("--task", "rec", "-p", "dog", "--box", "1,2,3,4"), DataError, "task 'rec': it takes no region .--box"),
        (("--task", "pose", "--box", "1,2,3"), DataError, "--box: region '1,2,3': expected X1,Y1,X2,Y2 in pixels"),
        (("--task", "pose", "--box", "1,2,3,900"), DataError, "lies outside the image of 200x100"),
        (("--task", "pos"), RegistryError, "did you mean 'pose'"),
        (("-p", " "), DataError, "--prompt is empty"),
        (("-p", "a", "--draw", "x.nothing"), DataError, "Pillow writes no .nothing; take .png"),
        (("-p", "a", "--draw", "x"), DataError, "Pillow writes no file without an ending"),
    ],
)
def test_errors_cost_no_model(
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", tmp_path / "nothing")
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, ["generate", "-i", str(picture), *arguments], catch_exceptions=False)


def test_a_task_of_several_texts() -> None:
    class Two(tasks.VQA):
        name = "two"

        def prompt(self, one: str, other: str) -> str:
            return one + other

    with pytest.raises(DataError, match=r"task 'two': it takes more than one text \(one, other\)"):
        read_task(Two(), "a", None, GEOMETRY)


def test_counting() -> None:
    box = Box(0, 0, 1, 1)
    items = [GroundedPhrase("a", (box, box)), Keypoints({"nose": Point(1, 1)}), Point(2, 2), "words"]
    assert count_places(items) == "2 boxes and 2 points"
    assert count_places(["words"]) == ""


def test_the_picture_itself_stays(picture: Path, tmp_path: Path) -> None:
    assert check_target(tmp_path / "new.JPG", picture) == "JPEG"
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    with pytest.raises(DataError, match="this is the picture itself; name another file"):
        check_target(link, picture)


def test_a_drawing_appears_whole_or_not_at_all(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(picture) as image:
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.raises(DataError, match=r"found\.png: cannot be written"):
            save_drawing(blocked / "found.png", image, [])

        def fail(self: Image.Image, path: Path, format: str) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Image.Image, "save", fail)
        target = tmp_path / "found.png"
        target.write_text("before")
        with pytest.raises(DataError, match="cannot be written: disk full"):
            save_drawing(target, image, [])
    assert target.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "found.png", "picture.png"]


@pytest.mark.parametrize(("confidence", "is_told"), [(-0.4, False), (-0.6, True)])
def test_a_low_confidence_is_told(
    embedded: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, confidence: float, is_told: bool
) -> None:
    def generate(self: SphinxModel, *_: Any, **options: Any) -> list[Generation]:
        self.conversation = create("sphinx_v1", low_confidence=-0.5)
        return [Generation("5", [1], "stop", confidence=confidence)]

    monkeypatch.setattr(SphinxModel, "generate", generate)
    arguments = ["generate", "-i", str(picture), "-p", "What?", "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["confidence"] == confidence
    assert ("note" in found) == is_told == ("note: low confidence (-0.60" in result.stderr)
