"""Draw docs/images/front.png: SPHINX-nano's answers on held-out scenes, each about another task."""

from pathlib import Path

import numpy as np
from PIL import Image

from sphinxkit import nano
from sphinxkit.formatters.draw import draw_items, label_boxes
from sphinxkit.nano.world import World, render

# Kind of scene, its number, the task, the question's fields, the label of a bare box.
ANSWERS = (
    ("shapes", 5, "rec", {"phrase": "the red circle"}, "the red circle"),
    ("texts", 9, "text_detection", {}, ""),
    ("people", 4, "pose", {}, ""),
    ("page", 8, "layout", {}, ""),
)
SIZE, GAP = 224, 8


def front_picture() -> Image.Image:
    """The pictures side by side, the answers' boxes and key points drawn in."""
    model, world = nano.load(), World(split="test", size=SIZE)
    pictures = []
    for kind, number, task, fields, label in ANSWERS:
        scene = world.scene_of_kind(number, kind)
        asked = {"box": scene.people[0].rect.box} if task == "pose" else fields
        found = model.ask(task, render(scene), **asked)
        pictures.append(draw_items(Image.fromarray(render(scene)), label_boxes(found.items, label)))
    gap = np.full((SIZE, GAP, 3), 255, dtype=np.uint8)
    parts = [part for picture in pictures for part in (np.asarray(picture), gap)]
    return Image.fromarray(np.concatenate(parts[:-1], axis=1))


if __name__ == "__main__":
    front_picture().save(Path(__file__).parent / "images" / "front.png", optimize=True)
