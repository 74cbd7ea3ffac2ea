"""Read boxes out of any model's answer and draw them on the picture that was asked about."""

import tempfile
from pathlib import Path

from PIL import Image

from sphinxkit.formatters import tasks
from sphinxkit.formatters.draw import draw_items
from sphinxkit.geometry import ImageGeometry
from sphinxkit.nano.world import World, render

world = World(size=(160, 112))
picture = Image.fromarray(render(world.scene(7, "detection")))

detection = tasks.create("detection")
example = detection.format(world.samples(7, "detection")[0])
print(example.instruction)  # what to ask: model.chat([{"role": "user", "content": ...}], picture)
print(example.answer)  # what a model that is right says

found = detection.parse(
    example.answer, ImageGeometry(*picture.size)
)  # fractions of the padded square -> the picture's pixels
for phrase in found.items:
    print(phrase.phrase, [tuple(map(round, (box.x1, box.y1, box.x2, box.y2))) for box in phrase.boxes])
print("errors:", [tasks.ERROR_KINDS[error.kind] for error in found.errors])

with tempfile.TemporaryDirectory() as folder:
    target = Path(folder) / "found.png"
    draw_items(picture, found.items).save(target)
    with Image.open(target) as drawn:
        print(target.name, drawn.size)
