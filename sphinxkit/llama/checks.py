"""What a LLaMA refuses, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sphinxkit.errors import ShapeError
from sphinxkit.llama.cache import KVCache

MAX_LAYERS = 256  # the largest Llama has 126; each costs time to make even without memory; our choice


class Sized(Protocol):
    """The sizes of a model that the checks look at."""

    embed_dim: int
    num_layers: int
    head_dim: int
    max_seq_len: int


def check_sizes(**sizes: int | None) -> None:
    """Refuse sizes that make no model; see ``LlamaModel`` for their meaning.

    Args:
        sizes: ``embed_dim``, ``num_heads``, ``num_kv_heads``, ``head_dim`` and others; None is not looked at.
    Raises:
        ShapeError: A size is not positive or the heads do not divide the width.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ShapeError(f"LLaMA: {name} must be at least 1, got {size}")
    if (sizes.get("num_layers") or 0) > MAX_LAYERS:
        raise ShapeError(f"LLaMA: num_layers may be {MAX_LAYERS} at most, got {sizes['num_layers']}")
    embed_dim, num_heads, head_dim = sizes["embed_dim"] or 0, sizes["num_heads"] or 1, sizes["head_dim"]
    kv_heads = sizes["num_kv_heads"] or 1
    if head_dim is None and embed_dim % num_heads:
        raise ShapeError(f"LLaMA: embed_dim {embed_dim} cannot be divided among num_heads {num_heads}")
    if num_heads % kv_heads:
        raise ShapeError(f"LLaMA: num_heads {num_heads} is not a multiple of num_kv_heads {kv_heads}")
    width = embed_dim // num_heads if head_dim is None else head_dim
    if width % 2:
        source = f"embed_dim {embed_dim} / num_heads {num_heads}" if head_dim is None else "head_dim"
        raise ShapeError(f"LLaMA: rotary positions need an even head width, got {width} ({source})")


def check_capacity(model: Sized, capacity: int) -> None:
    """Refuse a cache that is longer than the model's context.

    Raises:
        ShapeError: It is.
    """
    if capacity > model.max_seq_len:
        raise ShapeError(
            f"LLaMA: a cache of {capacity} tokens was asked for, but the model's max_seq_len is {model.max_seq_len}"
        )


def check_inputs(
    model: Sized,
    embeds: Tensor,
    cache: KVCache | None,
    lengths: Sequence[int] | Tensor | None,
    seq_lens: Sequence[int] | None,
    output_positions: Tensor | slice | None,
) -> None:
    """Refuse what ``LlamaModel.hidden_states`` cannot read; see there for the arguments.

    Shape:
        embeds: (B, S, D)
    Raises:
        ShapeError: Sizes disagree or a limit is passed.
    """
    if embeds.ndim != 3 or embeds.shape[2] != model.embed_dim or embeds.shape[1] == 0:
        raise ShapeError(
            f"LLaMA: expected embeds (B, S, {model.embed_dim}) with S at least 1, got {tuple(embeds.shape)}"
        )
    batch_size, width = embeds.shape[:2]
    if cache is not None:
        check_cache(model, cache, batch_size)
        if seq_lens is not None:
            raise ShapeError("LLaMA: seq_lens (packed samples) and a cache cannot be used together")
    elif lengths is not None:
        raise ShapeError("LLaMA: lengths says what a cache is to keep, but no cache was given")
    if seq_lens is not None:
        if batch_size != 1:
            raise ShapeError(f"LLaMA: packed samples (seq_lens) come as one row, got {batch_size} rows")
        if any(length < 1 for length in seq_lens) or sum(seq_lens) != width:
            raise ShapeError(
                f"LLaMA: seq_lens must be positive and sum to the {width} tokens given, got {list(seq_lens)} "
                f"with sum {sum(seq_lens)}"
            )
    longest = width if seq_lens is None else max(seq_lens)
    if cache is None and longest > model.max_seq_len:
        raise ShapeError(f"LLaMA: a sequence of {longest} tokens is longer than max_seq_len {model.max_seq_len}")
    if isinstance(output_positions, Tensor) and (
        output_positions.ndim not in (1, 2) or output_positions.shape[0] != batch_size
    ):
        raise ShapeError(
            f"LLaMA: output_positions must be ({batch_size},) or ({batch_size}, R), got {tuple(output_positions.shape)}"
        )
    if isinstance(output_positions, Tensor) and output_positions.device.type == "cpu":  # elsewhere it would wait
        outside = output_positions[(output_positions < -width) | (output_positions >= width)].tolist()
        if outside:
            raise ShapeError(f"LLaMA: output_positions {outside} lie outside of the {width} positions given")


def check_cache(model: Sized, cache: KVCache, batch_size: int) -> None:
    """Refuse a cache that is not the model's or is for other rows.

    Raises:
        ShapeError: It is not.
    """
    check_capacity(model, cache.max_seq_len)
    if cache.batch_size != batch_size:
        raise ShapeError(f"LLaMA: {batch_size} rows were given, but the cache has {cache.batch_size}")
    got, expected = (cache.num_layers, cache.head_dim), (model.num_layers, model.head_dim)
    if got != expected:
        raise ShapeError(
            f"LLaMA: the cache is for (num_layers, head_dim) {got}, but the model has {expected}; "
            "make_cache gives one that fits"
        )
