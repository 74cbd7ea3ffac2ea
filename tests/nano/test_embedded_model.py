"""The trained model that comes with the package answers a question about a picture it has never seen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.formatters.tasks import create
from sphinxkit.nano.world import World, render

WEIGHTS = Path(sphinxkit.__file__).parent / "nano" / "weights"
pytestmark = pytest.mark.skipif(
    not any(WEIGHTS.glob("model*.safetensors")), reason="this checkout is without SPHINX-nano's weights"
)

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "nano_scene.png"  # the README's: test, 224 pixels, shapes 5
IOU = 0.5


def _ask(*arguments: str, image: Path = PICTURE) -> str:
    picture = ("--image", str(image), "--device", "cpu")
    result = CliRunner().invoke(app, ["generate", *picture, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.strip()


def test_the_picture_is_one_of_the_held_out_scenes() -> None:
    scene = World("synthetic", "test", size=224).scene_of_kind(5, "shapes")
    assert (np.asarray(Image.open(PICTURE).convert("RGB")) == render(scene)).all()


def test_the_readmes_answers_are_right(tmp_path: Path) -> None:
    scene = World("synthetic", "test", size=224).scene_of_kind(5, "shapes")
    assert _ask("--task", "vqa", "--prompt", "How many shapes are there?") == str(len(scene.shapes)) == "2"
    circle = next(shape for shape in scene.shapes if (shape.color, shape.shape) == ("red", "circle"))
    answer = _ask("--task", "rec", "--prompt", "the red circle", "--draw", str(tmp_path / "found.png"))
    (box,) = create("rec").parse(answer, scene.geometry).items
    assert box.iou(circle.rect.box) >= IOU
    assert (np.asarray(Image.open(tmp_path / "found.png")) != render(scene)).any()


def test_a_picture_of_another_kind_is_told(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    question = ("--task", "vqa", "--prompt", "How many shapes are there?", "--json")
    assert json.loads(_ask(*question, image=tmp_path / "noise.png"))["note"].startswith("unfamiliar picture (distance ")
    assert "note" not in json.loads(_ask(*question))


def test_chat_tells_it_when_the_picture_is_opened(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    lines = f"How many shapes are there?\n/image {tmp_path / 'noise.png'}\n/exit\n"
    result = CliRunner().invoke(app, ["chat", "--image", str(PICTURE), "--device", "cpu"], input=lines)
    assert result.exit_code == 0
    before, asked, opened, _ = result.stderr.split("you> ")
    assert ["note" in part for part in (before, asked)] == [False, False]
    assert opened.startswith("note: unfamiliar picture (distance ")


def test_chat_tells_an_uncertain_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.sphinx_model.answers.uncertainty", lambda _, confidence: f"only {confidence:.2f}")
    lines = "How many shapes are there?\n/exit\n"
    result = CliRunner().invoke(app, ["chat", "--image", str(PICTURE), "--device", "cpu"], input=lines)
    assert re.search(r"^you> note: only -\d\.\d\d$", result.stderr, re.MULTILINE)
