"""Draw docs/images/nano_world.png: a row of scenes, one of each kind, for three worlds."""

from pathlib import Path

import numpy as np
from PIL import Image

from sphinxkit.nano.world import KINDS, World, render

WORLDS = (World("synthetic", size=96), World("real", size=96), World("synthetic", "test", size=96))
FIRST = 12
FRAME = ((2, 2), (2, 2), (0, 0))


def contact_sheet() -> Image.Image:
    rows = [[np.pad(render(world.scene_of_kind(FIRST, kind)), FRAME) for kind in KINDS] for world in WORLDS]
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))


if __name__ == "__main__":
    contact_sheet().save(Path(__file__).parent / "images" / "nano_world.png", optimize=True)
