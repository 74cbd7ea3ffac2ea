"""Keys and values of the tokens a model has already read, for rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sphinxkit.errors import ShapeError
from sphinxkit.to_device import to_device

_SLOT_MULTIPLE = 8  # additive masks want rows of a multiple of 8 elements in CUDA's memory-efficient kernel


@dataclass(frozen=True, slots=True, eq=False)
class CacheWrite:
    """Where the tokens of one forward pass go in a cache; made by ``KVCache.prepare_write``.

    Args:
        width: Columns of the pass, S.
        starts: Position of column 0 of each row; the cache's own ``lengths``, so they hold until ``advance``.
        ends: For each row, how many slots are filled after the pass; None where that would need a device
            synchronisation.
        counts: Real tokens of each row; None if all S are.
        start: The position of column 0 where the host knows that it is the same for all rows, else None.
        num_keys: Slots that the pass has to look at: all with static shapes, else up to the longest row.
        tokens: Index of the real tokens in the flattened (B*S) grid; None if all columns are written.
        rows: Row of each token that is written; None if ``start`` says it all.
        slots: Slot of each token that is written; None if ``start`` says it all.
    Shape:
        starts, counts: (B,) int64
        tokens, rows, slots: (N,) int64
    """

    width: int
    starts: Tensor
    ends: tuple[int, ...] | None
    counts: Tensor | None
    start: int | None
    num_keys: int
    tokens: Tensor | None
    rows: Tensor | None
    slots: Tensor | None


class KVStore(Protocol):
    """What the layers ask of a cache; ``KVCache`` is one."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        ...

    def write(self, layer: int, keys: Tensor, values: Tensor, where: CacheWrite) -> None:
        """Store one layer's new keys and values (B, S, Hkv, D)."""
        ...

    def read(self, layer: int, where: CacheWrite) -> tuple[Tensor, Tensor]:
        """One layer's keys and values (B, Hkv, where.num_keys, D)."""
        ...


class KVCache:
    """Preallocated keys and values; every row has its own length.

    ``keys[layer]`` and ``values[layer]`` read as (B, Hkv, slots, D) everywhere. In memory they are laid out that way
    on a CPU, where a decoding step streams each head's keys up to the longest row. With static shapes (the default on
    other devices) the memory is (B, slots, Hkv, D), which xformers sees as one sequence (1, B*slots, Hkv, D) without
    a copy; every pass looks at all slots, and a decoding step does not ask the device for anything. There is at least
    one slot more than ``max_seq_len``, where a full row in a batch with running ones may write its padding.

    A row's slots beyond its length hold what was there before and are never attended to; ``lengths`` may be lowered
    in place to forget the end of a row, or raised where slots were filled from outside (``lengths_changed``).

    Args:
        num_layers: Number of decoder layers.
        batch_size: Number of rows, B.
        max_seq_len: Tokens that each row can hold.
        num_kv_heads: Key and value heads, Hkv.
        head_dim: Channels of a head, D.
        device: Where it lives.
        dtype: Of keys and values; float32 with a 16-bit model works too.
        static_shapes: Look at all slots in every pass; None means yes except on a CPU.
    Shape:
        lengths: (B,) int64, tokens held by each row
    Raises:
        ShapeError: A size is not positive.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        static_shapes: bool | None = None,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "batch_size": batch_size,
            "max_seq_len": max_seq_len,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ShapeError(f"KV cache: {name} must be at least 1, got {size}")
        self.num_layers = num_layers
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_slots = (max_seq_len + _SLOT_MULTIPLE) // _SLOT_MULTIPLE * _SLOT_MULTIPLE
        with torch.inference_mode(False):  # a cache made inside inference_mode must stay usable outside of it
            self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.static_shapes = self.lengths.device.type != "cpu" if static_shapes is None else static_shapes
            self.keys = [self._allocate(device, dtype) for _ in range(num_layers)]
            self.values = [self._allocate(device, dtype) for _ in range(num_layers)]
        self._longest = 0  # no row is longer; exact or above, and only read with static shapes

    def _allocate(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        # zeros, not empty: a masked slot has weight 0, and 0 * NaN is NaN
        if not self.static_shapes:
            shape = (self.batch_size, self.num_kv_heads, self.num_slots, self.head_dim)
            return torch.zeros(shape, device=device, dtype=dtype)
        shape = (self.batch_size, self.num_slots, self.num_kv_heads, self.head_dim)
        return torch.zeros(shape, device=device, dtype=dtype).transpose(1, 2)

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self.lengths.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self.keys[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Forget some rows, or all.

        Args:
            rows: Indices of the rows; None for all.
        Shape:
            rows: (R,)
        """
        if rows is None:
            self.lengths.zero_()
            self._longest = 0
        else:
            self.lengths[to_device(rows, self.device)] = 0

    def erase(self, row: int) -> None:
        """Forget a row and what its slots hold, such as NaN, which a later row would read: 0 times NaN is NaN.

        Args:
            row: Index of the row.
        """
        for tensor in (*self.keys, *self.values):
            tensor[row] = 0
        self.reset([row])

    def keep_rows(self, rows: Sequence[int] | Tensor) -> None:
        """Drop all rows but some, in place: the batch becomes smaller, the memory stays.

        Args:
            rows: Indices of the rows to keep, ascending.
        Shape:
            rows: (R,)
        Raises:
            ShapeError: The indices are not ascending row numbers.
        """
        kept = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.batch_size:
            raise ShapeError(f"KV cache: expected ascending rows between 0 and {self.batch_size - 1}, got {kept}")
        longest = int(self.lengths.max())
        with torch.inference_mode(False):  # as when it was made
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    for target, source in enumerate(kept):
                        if target != source:
                            tensor[target, :, :longest] = tensor[source, :, :longest]
                    tensors[layer] = tensor[: len(kept)]
            self.lengths = self.lengths[to_device(kept, self.device)]
        self.batch_size = len(kept)

    def prepare_write(self, width: int, counts: Sequence[int] | Tensor | None = None) -> CacheWrite:
        """Where the next ``width`` columns go. Nothing is written.

        With static shapes a prompt into an empty cache and a decoding step (width 1) do not wait for the device, except
        close to the capacity.

        Args:
            width: Columns of the pass, S.
            counts: How many of them are real in each row, from the left; None for all.
        Shape:
            counts: (B,)
        Raises:
            ShapeError: A row would not hold its tokens, or ``counts`` is not B numbers between 0 and S.
        """
        given, known = self._check_counts(width, counts)
        starts: list[int] | None = None
        if self.static_shapes and self._longest == 0:
            starts = [0] * self.batch_size
        elif not self.static_shapes or known is not None or self._longest + width > self.max_seq_len:
            starts = self.lengths.tolist()
            self._longest = max(starts)
        ends: tuple[int, ...] | None = None
        if starts is not None:
            if known is None and given is not None:
                known = given.tolist()
            ends = tuple(start + count for start, count in zip(starts, known or [width] * len(starts), strict=True))
            for row, end in enumerate(ends):
                if end > self.max_seq_len:
                    raise ShapeError(
                        f"KV cache: row {row} holds {starts[row]} tokens and {end - starts[row]} more make {end}, "
                        f"but its capacity is {self.max_seq_len}"
                    )
        num_keys = max(1, *ends) if ends is not None and not self.static_shapes else self.num_slots
        slices = starts is not None and (starts[0] == 0 or not self.static_shapes) and len(set(starts)) == 1
        if starts is not None and slices and starts[0] + width <= self.num_slots:
            return CacheWrite(width, self.lengths, ends, given, starts[0], num_keys, None, None, None)
        return self._scatter(width, given, known, ends, num_keys)

    def lengths_changed(self) -> None:
        """Announce that ``lengths`` were raised from outside (lowering needs no call).

        With static shapes the host keeps a bound of the longest row instead of asking the device; the next pass will
        ask.
        """
        self._longest = self.max_seq_len

    def _scatter(
        self,
        width: int,
        counts: Tensor | None,
        known: Sequence[int] | None,
        ends: tuple[int, ...] | None,
        num_keys: int,
    ) -> CacheWrite:
        """A write whose rows start at different slots."""
        columns = torch.arange(width, device=self.device)
        rows = torch.arange(self.batch_size, device=self.device).repeat_interleave(width)
        slots = (self.lengths[:, None] + columns).flatten()
        tokens: Tensor | None = None
        if known is not None and width > 1:  # padding may not fit, so it is left out; one column always fits
            real = [row * width + column for row, count in enumerate(known) for column in range(count)]
            tokens = to_device(real, self.device, torch.int64)
            rows, slots = rows[tokens], slots[tokens]
        return CacheWrite(width, self.lengths, ends, counts, None, num_keys, tokens, rows, slots)

    def _check_counts(
        self, width: int, counts: Sequence[int] | Tensor | None
    ) -> tuple[Tensor | None, list[int] | None]:
        """``counts`` as a tensor on the cache's device, and as numbers where the host should have them."""
        if counts is None:
            return None, None
        given = counts if isinstance(counts, Tensor) else torch.tensor(counts, dtype=torch.int64, device="cpu")
        given = given.to(torch.int64)
        if given.shape != (self.batch_size,):
            raise ShapeError(f"lengths: expected {self.batch_size} numbers, one per row, got {tuple(given.shape)}")
        known = given.tolist() if given.device.type == "cpu" or width > 1 else None
        if known is not None and not all(0 <= count <= width for count in known):
            raise ShapeError(f"lengths: expected numbers between 0 and the {width} columns given, got {known}")
        return to_device(given, self.device), known if width > 1 or not self.static_shapes else None

    def write(self, layer: int, keys: Tensor, values: Tensor, where: CacheWrite) -> None:
        """Store one layer's new keys and values. The gradient ends here.

        Args:
            layer: Which decoder layer.
            keys: New keys, already rotated.
            values: New values.
            where: From ``prepare_write``.
        Shape:
            keys, values: (B, S, Hkv, D)
        """
        for cached, new in ((self.keys[layer], keys), (self.values[layer], values)):
            new = new.detach()
            if where.start is not None:
                cached[:, :, where.start : where.start + where.width] = new.transpose(1, 2)
            else:
                new = new.flatten(0, 1)
                new = new if where.tokens is None else new[where.tokens]
                cached.transpose(1, 2)[where.rows, where.slots] = new.to(cached.dtype)

    def read(self, layer: int, where: CacheWrite) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, as far as a pass looks.

        Args:
            layer: Which decoder layer.
            where: From ``prepare_write``.
        Shape:
            return: two of (B, Hkv, where.num_keys, D)
        """
        return self.keys[layer][:, :, : where.num_keys], self.values[layer][:, :, : where.num_keys]

    def advance(self, where: CacheWrite) -> None:
        """Count the tokens written as held, once every layer has been written."""
        self.lengths += where.width if where.counts is None else where.counts
        self._longest = self._longest + where.width if where.ends is None else max(where.ends)
