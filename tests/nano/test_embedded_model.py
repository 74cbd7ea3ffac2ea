"""The trained model that comes with the package answers a question about a picture it has never seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.data.procedural import World

WEIGHTS = Path(sphinxkit.__file__).parent / "nano" / "weights"
pytestmark = pytest.mark.skipif(
    not any(WEIGHTS.glob("model*.safetensors")), reason="this checkout is without SPHINX-nano's weights"
)

# A scene of the split that training never sees, at the size of the model's pictures; to become the README's case.
SCENE, SIZE = 3, 112


def test_a_right_answer(tmp_path: Path) -> None:
    world = World("synthetic", "test", size=SIZE)
    sample = world.samples(SCENE, "vqa")[0]
    Image.fromarray(world.scene(SCENE, "vqa").image).save(tmp_path / "scene.png")
    asked = ("--image", str(tmp_path / "scene.png"), "--task", "vqa", "--prompt", sample.question)
    result = CliRunner().invoke(app, ["generate", *asked, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip() == sample.answer
