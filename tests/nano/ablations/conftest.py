from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinxkit.recipe import build


@pytest.fixture(scope="session")
def encoders(micro_recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "model"
    torch.manual_seed(11)
    build(micro_recipes / "model.yaml").save(folder)
    return folder
