"""Scenes as pixels: integer arithmetic on uint8 arrays and nothing else, so that every machine draws the same.

The rule: no floating-point number, no font file, no drawing library, no library's random numbers. Arrays have stated
integer types and every result fits them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sphinxkit.nano.world.figures import CLOTHES, FACE, HAIR, JOINT
from sphinxkit.nano.world.figures import SKIN as SKIN_LABEL
from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.page_blocks import paint_block
from sphinxkit.nano.world.palette import COLORS, DARK, RGB, SKIN, luminance
from sphinxkit.nano.world.palette import HAIR as HAIR_COLOR
from sphinxkit.nano.world.rng import Rng, random_bytes
from sphinxkit.nano.world.scene import Chart, Person, Scene, Shape, Word
from sphinxkit.nano.world.shapes import shape_mask

Canvas = NDArray[np.uint8]

TEXTURE_CELLS = 8  # of the coarse grid along a side; our choice
TEXTURE_BITS = 4  # the texture changes a pixel by -2**TEXTURE_BITS to 2 * 2**TEXTURE_BITS
NOISE_BITS = 4  # the noise changes a channel by at most 2**(NOISE_BITS - 1)
_DARK_CLOTHES = 90  # luminance below which joints are drawn light


def render(scene: Scene) -> Canvas:
    """Draw a scene.

    Args:
        scene: What is in it.
    Shape:
        return: (height, width, 3) uint8
    """
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.uint8)
    canvas.reshape(scene.height, -1)[:] = np.array(scene.tint * scene.width, dtype=np.uint8)  # whole rows: fast
    is_real = scene.domain == "real"
    if is_real:
        add_texture(canvas, scene.noise_seed, is_faint=bool(scene.columns) or scene.chart is not None)
    for word in scene.words:
        paint_word(canvas, word)
    for shape in scene.shapes:
        paint_shape(canvas, shape)
    for person in scene.people:
        paint_person(canvas, person)
    for block in scene.blocks:
        paint_block(canvas, block, scene.tint)
    if scene.chart is not None:
        paint_chart(canvas, scene.chart)
    if is_real:
        add_noise(canvas, scene.noise_seed)
    canvas.setflags(write=False)
    return canvas


def paint_mask(canvas: Canvas, mask: NDArray[np.bool_], left: int, top: int, rgb: RGB) -> None:
    """Paint the pixels of a mask whose top left corner is at (left, top)."""
    canvas[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = rgb


def paint_shape(canvas: Canvas, shape: Shape) -> None:
    """Paint a shape."""
    paint_mask(canvas, shape_mask(shape.shape, shape.side), shape.rect.x1, shape.rect.y1, shape.rgb)


def paint_word(canvas: Canvas, word: Word) -> None:
    """Paint a word and its sign."""
    if word.panel is not None:
        rect, _, rgb = word.panel
        canvas[rect.y1 : rect.y2, rect.x1 : rect.x2] = rgb
    paint_mask(canvas, text_mask(word.text, word.scale), word.rect.x1, word.rect.y1, word.rgb)


def paint_person(canvas: Canvas, person: Person) -> None:
    """Paint a stick figure."""
    palette = np.zeros((6, 3), dtype=np.uint8)
    palette[CLOTHES], palette[SKIN_LABEL], palette[HAIR], palette[FACE] = person.rgb, SKIN, HAIR_COLOR, DARK
    palette[JOINT] = (250, 250, 250) if luminance(person.rgb) < _DARK_CLOTHES else (20, 20, 20)
    labels, rect = person.figure.labels, person.rect
    region = canvas[rect.y1 : rect.y2, rect.x1 : rect.x2]
    drawn = labels > 0
    region[drawn] = palette[labels[drawn]]


def paint_chart(canvas: Canvas, chart: Chart) -> None:
    """Paint a chart's bars, labels, values and axis."""
    for bar in chart.bars:
        canvas[bar.rect.y1 : bar.rect.y2, bar.rect.x1 : bar.rect.x2] = COLORS[bar.color]
        for text, (left, top) in ((bar.label, bar.label_at), (str(bar.value), bar.value_at)):
            paint_mask(canvas, text_mask(text, chart.scale), left, top, DARK)
    canvas[chart.axis.y1 : chart.axis.y2, chart.axis.x1 : chart.axis.x2] = DARK


def _add(canvas: Canvas, change: NDArray[np.int16], least: int, most: int) -> None:
    """Add ``least`` to ``most`` to every pixel of a picture, which is made to leave room for it; in place, in bytes."""
    np.clip(canvas, np.uint8(-least), np.uint8(255 - most), out=canvas)
    canvas += change.astype(np.uint8).repeat(3, axis=1).reshape(canvas.shape)  # modulo 256: adding 250 takes 6 away


def add_texture(canvas: Canvas, noise_seed: int, *, is_faint: bool = False) -> None:
    """Add a smooth random brightness and, in half of the pictures, stripes; in place.

    Args:
        canvas: Leaves room for the change, or is clipped first, as no tint is.
        noise_seed: 64 bits.
        is_faint: Take away up to 4 and no more: paper.
    """
    rng = Rng("texture", noise_seed)
    height, width, _ = canvas.shape
    cells = TEXTURE_CELLS
    grid = random_bytes(rng.key, (cells + 1) ** 2).reshape(cells + 1, cells + 1).astype(np.uint16)

    def smooth(values: NDArray[np.uint16], length: int) -> NDArray[np.uint16]:
        """Rows of values up to 255, interpolated to ``length`` rows."""
        place = np.arange(length, dtype=np.int32) * (cells << 8) // length  # in 1/256 of a cell
        cell, part = place >> 8, (place & 255).astype(np.uint16)[:, None]
        mixed: NDArray[np.uint16] = (values[cell] * (np.uint16(256) - part) + values[cell + 1] * part) >> np.uint16(8)
        return mixed

    field = np.ascontiguousarray(smooth(np.ascontiguousarray(smooth(grid, height).T), width).T).astype(np.int16)
    if is_faint:
        _add(canvas, (field >> 6) - 4, -4, 0)
        return
    change = (field - 128) >> (7 - TEXTURE_BITS)
    if rng.chance(50):
        dx, dy, period = rng.between(-3, 3), rng.between(1, 3), rng.between(6, 16)
        phase = np.arange(4 * period, dtype=np.int32) % (2 * period)
        wave = (np.minimum(phase, 2 * period - phase) * (1 << TEXTURE_BITS) // period).astype(np.int16)
        across = np.arange(width, dtype=np.int32) * dx % (2 * period)
        down = np.arange(height, dtype=np.int32) * dy % (2 * period)
        rows = wave[across[None, :] + np.arange(2 * period, dtype=np.int32)[:, None]]
        change += rows[down]
    _add(canvas, change, -1 << TEXTURE_BITS, 2 << TEXTURE_BITS)


def add_noise(canvas: Canvas, noise_seed: int) -> None:
    """Add independent noise to every channel of every pixel; in place."""
    half = 1 << (NOISE_BITS - 1)
    noise = random_bytes(Rng("noise", noise_seed).key, canvas.size).reshape(canvas.shape)
    np.clip(canvas, np.uint8(half), np.uint8(256 - half), out=canvas)
    canvas += noise & np.uint8(2 * half - 1)
    canvas -= np.uint8(half)
