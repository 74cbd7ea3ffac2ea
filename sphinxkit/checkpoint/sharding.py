"""From the tensors in files to entries under canonical names, and slices of a tensor for the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from sphinxkit.checkpoint.entries import Entry, Replicas
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.lazy import StoredTensor

UNFIT = "the tensors do not fit together"
SplitDim = Callable[[NameRule, StoredTensor], int | None]


def split_by_rule(rule: NameRule, stored: StoredTensor) -> int | None:
    """The dimension that the rule says; what every released SPHINX file follows."""
    del stored
    return rule.split_dim


def merge_shards(
    folder: Path,
    shards: Sequence[Mapping[str, StoredTensor]],
    key_map: KeyMap,
    replicas: Replicas = "equal",
    split_dim: SplitDim = split_by_rule,
    faults: list[str] | None = None,
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Join tensor-parallel shards by name.

    Args:
        folder: For messages.
        shards: The tensors of each file, in order.
        key_map: The format's names.
        replicas: See :data:`~sphinxkit.checkpoint.entries.Replicas`.
        split_dim: Which dimension is split.
        faults: Takes up what would be raised, for a caller who has more to say.
    Returns:
        Entries under canonical names; entries of the unused group under their own names.
    Raises:
        CheckpointError: Every name that a shard lacks or that nothing knows, and every slice that does not fit.
    """
    named: dict[str, Entry] = {}
    unused: dict[str, Entry] = {}
    found_faults: list[str] = []
    names = list(dict.fromkeys(name for shard in shards for name in shard))
    for name in names:
        lacking = [next(iter(shard.values())).file.name for shard in shards if name not in shard]
        if lacking:
            found_faults.append(f"{name!r} is missing in {', '.join(lacking)}; fetch the shards again")
            continue
        parts = [shard[name] for shard in shards]
        if key_map.is_derived(name):
            continue
        found = key_map.to_ours(name)
        try:
            if key_map.is_unused(name):
                unused[name] = Entry(parts, replicas=replicas)
            elif found is None:
                found_faults.append(f"{name!r} is not a name this format has")
            elif found[0] in named:
                found_faults.append(f"{name!r} is a second tensor for {found[0]!r}")
            else:
                named[found[0]] = Entry(parts, split_dim(found[1], parts[0]), replicas=replicas)
        except CheckpointError as error:
            found_faults.append(str(error))
    if faults is None:
        raise_errors(f"{folder}: {UNFIT}", found_faults)
    else:
        faults += found_faults
    return named, unused


def shard_shape(shape: tuple[int, ...], dim: int | None, count: int, name: str) -> tuple[int, ...]:
    """Shape of each of ``count`` slices along ``dim`` (None: the whole shape).

    Raises:
        CheckpointError: The dimension does not divide evenly.
    """
    if dim is None or count == 1:
        return shape
    if shape[dim] % count:
        raise CheckpointError(f"{name!r} {list(shape)} cannot be split into {count} along dimension {dim}")
    return (*shape[:dim], shape[dim] // count, *shape[dim + 1 :])


def take_shard(tensor: Tensor, dim: int | None, count: int, rank: int) -> Tensor:
    """The slice of ``tensor`` that shard ``rank`` of ``count`` holds; a view."""
    if dim is None or count == 1:
        return tensor
    width = tensor.shape[dim] // count
    return tensor.narrow(dim, rank * width, width)


def rotary_to_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows ordered in halves per head (Hugging Face) to neighbouring pairs (Meta, canonical).

    Args:
        tensor: (num_heads * head_dim, D).
        num_heads: Heads of this projection.
    Source: transformers, models/llama/convert_llama_weights_to_hf.py, permute (the inverse).
    """
    rows, width = tensor.shape
    return tensor.reshape(num_heads, 2, rows // num_heads // 2, width).transpose(1, 2).reshape(rows, width)


def rotary_to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`rotary_to_pairs`.

    Args:
        tensor: (num_heads * head_dim, D).
        num_heads: Heads of this projection.
    """
    rows, width = tensor.shape
    return tensor.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def rotary_reorder(rule: NameRule, num_heads: int, num_kv_heads: int) -> Callable[[Tensor], Tensor] | None:
    """What turns a Hugging Face tensor into a canonical one; None where both are the same."""
    if rule.rotary is None:
        return None
    return partial(rotary_to_pairs, num_heads=num_heads if rule.rotary == "query" else num_kv_heads)
