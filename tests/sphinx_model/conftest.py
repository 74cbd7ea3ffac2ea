from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import sphinxkit
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tilers import load_image


@pytest.fixture(scope="session")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


@pytest.fixture(scope="session")
def images(golden: Path) -> list[Image.Image]:
    return [load_image(golden / "images" / f"{name}.png") for name in ("wide", "tall", "square")]


class Calls:
    """Counts what a model reads while it is watched."""

    def __init__(self) -> None:
        self.num_views = 0
        self.widths: list[int] = []  # columns of every pass of the language model

    @property
    def num_prompt_tokens(self) -> int:
        return sum(width for width in self.widths if width > 1)


@pytest.fixture
def calls(model: SphinxModel, monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    assert model.vision is not None
    encoder = model.vision.branches[0].encoders[0]
    encode, read = encoder.forward, model.llm.forward

    def counting_encode(pixels):
        found.num_views += len(pixels)
        return encode(pixels)

    def counting_read(embeds, **options):
        found.widths += [embeds.shape[1]] * embeds.shape[0]
        return read(embeds, **options)

    monkeypatch.setattr(encoder, "forward", counting_encode)
    monkeypatch.setattr(model.llm, "forward", counting_read)
    return found
