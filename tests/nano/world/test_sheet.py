from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

DOCS = Path(__file__).parents[3] / "docs"


def test_the_documented_picture_is_what_is_drawn() -> None:
    sheet = runpy.run_path(str(DOCS / "nano_world_sheet.py"))["contact_sheet"]()
    with Image.open(DOCS / "images" / "nano_world.png") as committed:
        assert np.array_equal(np.asarray(committed.convert("RGB")), np.asarray(sheet))
