"""Rounds coordinates in a question to the grid of the model's training data."""

from __future__ import annotations

import re

from sphinxkit.formatters.tasks.coordinates import DECIMALS

_NUMBER = r"(?:[01]?\.[0-9]+)"
_GROUP = rf"\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{1,3}}\s*"
_LIST = re.compile(rf"\[{_GROUP}(?:;{_GROUP})*\]")  # points or boxes, as the tasks write them


def move_to_grid(text: str, steps: int) -> str:
    """Round the coordinates in a text to whole steps of 1/``steps`` of the padded square's side.

    Args:
        text: A message; only lists of points or boxes in it change, ``[0.101,0.300,0.599,0.802]``.
        steps: Steps along a side.
    Returns:
        The text, with three decimals for each coordinate that was rounded.
    """

    def number(found: re.Match[str]) -> str:
        return f"{min(round(float(found.group()) * steps), steps) / steps:.{DECIMALS}f}"

    return _LIST.sub(lambda found: re.sub(_NUMBER, number, found.group()), text)
