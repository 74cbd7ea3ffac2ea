"""Held-out content: scenes, colour-shape pairs, words, page layouts and poses.

Everything here is a pure function of the thing itself, so no list has to be kept and nothing can leak:

- A scene belongs to one split by its content: the content's hash modulo ``NUM_CLASSES``. The background's tint is drawn
  last, again and again, until the scene falls into the target split. No scene of one split can be of another.
- A colour and a shape are held out as a pair if the sum of their numbers is a multiple of ``HELD_OUT_ONE_IN``: each
  colour and each shape is seen in training, but not together.
- A word (or numeral), a page layout (the classes of its blocks, column by column) or a pose (its limbs' directions) is
  held out if its hash is a multiple of ``HELD_OUT_ONE_IN``.

``train`` and ``val`` hold nothing that is held out. In ``test`` every word, layout and pose is held out, and of the
shapes the first and about half of the others; its questions are about those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sphinxkit.data.permutation import derive_key
from sphinxkit.errors import DataError
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.shapes import SHAPES

Split = Literal["train", "val", "test"]

NUM_CLASSES = 8  # our choice
SPLIT_CLASSES: Mapping[str, frozenset[int]] = {
    "test": frozenset({0}),
    "val": frozenset({1}),
    "train": frozenset(range(2, NUM_CLASSES)),
}
HELD_OUT_ONE_IN = 8  # our choice: one pair of each colour and each shape, as there are eight of both


def check_split(split: str) -> None:
    """Refuse a split that does not exist.

    Raises:
        DataError: The split is none of ``SPLIT_CLASSES``.
    """
    if split not in SPLIT_CLASSES:
        raise DataError(f"world: split {split!r}, expected one of {', '.join(sorted(SPLIT_CLASSES))}")


def split_of(content_hash: int) -> str:
    """The split of a scene, by its content's hash."""
    return next(split for split, classes in SPLIT_CLASSES.items() if content_hash % NUM_CLASSES in classes)


def is_held_out_pair(color: str, shape: str) -> bool:
    """Whether training never shows this shape in this colour."""
    return (tuple(COLORS).index(color) + SHAPES.index(shape)) % HELD_OUT_ONE_IN == 0


def _is_held_out(kind: str, *parts: object) -> bool:
    return derive_key(kind, *parts) % HELD_OUT_ONE_IN == 0


def is_held_out_word(word: str) -> bool:
    """Whether training never shows this word or numeral, neither in pictures nor in text."""
    return _is_held_out("word", word)


def is_held_out_layout(columns: tuple[tuple[str, ...], ...]) -> bool:
    """Whether training never shows a page with these classes of blocks, column by column."""
    return _is_held_out("layout", columns)


def is_held_out_pose(limbs: tuple[int, ...], facing: str) -> bool:
    """Whether training never shows a person with these directions of the limbs."""
    return _is_held_out("pose", limbs, facing)
