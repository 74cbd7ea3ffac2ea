from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sphinxkit
from sphinxkit import nano
from sphinxkit.sphinx_model import SphinxModel

# nano has user-defined pieces, five views and a coordinate grid
SLOW = ("llama_ens", "llama_ens5", "llama_ens_light")
MODELS = ["nano", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@dataclass
class Pair:
    """The same model here and there."""

    folder: Path
    ours: SphinxModel
    theirs: Any
    processor: Any
    image: Image.Image

    @property
    def num_image_tokens(self) -> int:
        return self.ours.require_vision().num_tokens


@pytest.fixture(scope="session", params=MODELS)
def pair(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from sphinxkit.integrations.transformers import register

    register()
    source = nano.path() if request.param == "nano" else golden / request.param
    folder = sphinxkit.convert(source, tmp_path_factory.mktemp("hf") / request.param, format="hf")
    return Pair(
        folder,
        sphinxkit.load(source, accelerate=None),
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        AutoProcessor.from_pretrained(folder),
        Image.open(golden / "images" / "wide.png"),
    )
