"""Pages: columns of blocks in PubLayNet's five classes."""

from __future__ import annotations

from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.page_blocks import TITLE_GAP
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Block, Rect
from sphinxkit.nano.world.splits import is_held_out_layout
from sphinxkit.nano.world.words import draw_word

# How often each class is drawn, and the least and most height in thousandths of the page's height; our choice.
BLOCKS = (
    ("text", 5, 130, 320),
    ("list", 2, 150, 280),
    ("table", 2, 160, 300),
    ("figure", 2, 180, 330),
)
TITLE_PERCENT = 80
TWO_COLUMNS_PERCENT = 50
LEAST_BLOCKS, MOST_BLOCKS = 1, 3  # in a column


def _classes(rng: Rng, held_out: bool) -> tuple[tuple[str, ...], ...]:
    """The classes of the blocks, column by column, without the title."""
    weights = [(name, weight) for name, weight, _, _ in BLOCKS]
    while True:
        num_columns = 2 if rng.chance(TWO_COLUMNS_PERCENT) else 1
        columns = tuple(
            tuple(rng.weighted(weights) for _ in range(rng.between(LEAST_BLOCKS, MOST_BLOCKS)))
            for _ in range(num_columns)
        )
        if is_held_out_layout(columns) == held_out:
            return columns


def draw_page(rng: Rng, width: int, height: int, scale: int, held_out: bool) -> tuple[tuple[Block, ...], ...]:
    """The blocks of a page, column by column; a title is the first of the first column.

    Every block of the layout has a place: blocks take what their class needs, the rest of the column stays empty.

    Args:
        rng: Random choices.
        width: Width of the page, in pixels.
        height: Height of the page, in pixels.
        scale: Pixels per pixel of the font, of a title.
        held_out: Whether layout and words are such that training never sees.
    """
    margin = max(3, min(width, height) * 6 // 100)
    classes = _classes(rng, held_out)
    top = margin + rng.between(0, margin)
    titles: list[Block] = []
    if rng.chance(TITLE_PERCENT):
        title = _title(rng, margin, top, width - margin, scale, held_out)
        titles.append(title)
        top = title.rect.y2 + margin
    gutter = margin
    column_width = (width - 2 * margin - gutter * (len(classes) - 1)) // len(classes)
    columns = []
    for index, kinds in enumerate(classes):
        left = margin + index * (column_width + gutter)
        column = _column(rng, kinds, Rect(left, top, left + column_width, height - margin), margin)
        columns.append((*titles, *column) if index == 0 else column)
    return tuple(columns)


def _title(rng: Rng, left: int, top: int, right: int, scale: int, held_out: bool) -> Block:
    words = [draw_word(rng, held_out, numerals=False)]
    if rng.chance(60):
        words.append(draw_word(rng, held_out, numerals=False))
    while scale > 1 and title_width(tuple(words), scale) > right - left:
        scale -= 1
    if title_width(tuple(words), scale) > right - left:
        words = words[:1]
    width = title_width(tuple(words), scale)
    start = left + (rng.below(2) * (right - left - width)) // 2
    height = text_mask(words[0], scale).shape[0]
    return Block("title", Rect(start, top, start + width, top + height), tuple(words), scale)


def title_width(words: tuple[str, ...], scale: int) -> int:
    """Columns that a title takes: its words and the gaps between them."""
    widths: list[int] = [text_mask(word, scale).shape[1] for word in words]
    return sum(widths) + TITLE_GAP * scale * (len(words) - 1)


def _column(rng: Rng, kinds: tuple[str, ...], room: Rect, margin: int) -> tuple[Block, ...]:
    free = room.height - margin * (len(kinds) - 1)
    ranges = {name: (low * room.height // 700, high * room.height // 700) for name, _, low, high in BLOCKS}
    wanted = [rng.between(*ranges[kind]) for kind in kinds]
    if sum(wanted) > free:
        wanted = [height * free // sum(wanted) for height in wanted]
    spare = free - sum(wanted)
    blocks = []
    y = room.y1
    for kind, height in zip(kinds, wanted, strict=True):
        y += rng.between(0, spare // len(kinds)) if spare > 0 else 0
        blocks.append(Block(kind, Rect(room.x1, y, room.x2, y + height), noise_seed=rng.bits()))
        y += height + margin
    return tuple(blocks)
