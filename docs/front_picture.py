"""Draw docs/images/front.png: SPHINX-nano's answers on held-out scenes, each about another task."""

from pathlib import Path

import numpy as np
from PIL import Image

from sphinxkit import nano
from sphinxkit.formatters.draw import draw_items
from sphinxkit.nano.world import World, render

ANSWERS = (
    ("mixed", 3, "grounded_caption"),
    ("texts", 0, "text_detection"),
    ("people", 1, "pose"),
    ("page", 5, "layout"),
)
"""Kind of scene, its number, the task."""
SIZE, GAP = 224, 8


def front_picture() -> Image.Image:
    """The pictures side by side, the answers' boxes and key points drawn in."""
    model, world = nano.load(), World(split="test", size=SIZE)
    pictures = []
    for kind, number, task in ANSWERS:
        scene = world.scene_of_kind(number, kind)
        asked = {"box": scene.people[0].rect.box} if task == "pose" else {}
        found = model.ask(task, render(scene), **asked)
        pictures.append(draw_items(Image.fromarray(render(scene)), found.items))
    gap = np.zeros((SIZE, GAP, 4), dtype=np.uint8)  # transparent
    parts = [part for picture in pictures for part in (np.asarray(picture.convert("RGBA")), gap)]
    return Image.fromarray(np.concatenate(parts[:-1], axis=1))


if __name__ == "__main__":
    front_picture().save(Path(__file__).parent / "images" / "front.png", optimize=True)
