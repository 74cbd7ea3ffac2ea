"""Moving rows from one KV cache to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.llama import KVCache


def copy_rows(source: KVCache, rows: Sequence[int], target: KVCache, places: Sequence[int], num_tokens: int) -> None:
    """Copy rows of one cache to places in another.

    Args:
        source: Where they are.
        rows: Which.
        target: With room for them.
        places: Their row numbers in ``target``.
        num_tokens: Slots that are copied: no row holds more.
    """
    if not rows:
        return
    given = to_device(rows, source.device)
    wanted = to_device(places, target.device)
    for ours, theirs in zip((*target.keys, *target.values), (*source.keys, *source.values), strict=True):
        ours[wanted, :, :num_tokens] = theirs[given, :, :num_tokens].to(ours.dtype)
    target.lengths[wanted] = source.lengths[given]
    target.lengths_changed()
