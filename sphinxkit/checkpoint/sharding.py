"""Tensors cut into tensor-parallel shards: joined when they are read, and sliced for the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.lazy import StoredTensor

Replicas = Literal["equal", "first"]
"""What to do with a tensor that every shard holds whole: insist that the copies are equal, or take the first one."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (NaN equals itself, -0.0 is not 0.0).

    Shape:
        a, b: any
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.is_complex:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


class MergedTensor:
    """One tensor made of the slices that the shards of a checkpoint hold; read lazily.

    Args:
        parts: One per shard, in order.
        dim: Dimension the slices are concatenated along; None: every part is the whole tensor.
        reorder: Applied to the whole tensor when it is read (the rotary permutation of Hugging Face files).
        replicas: See :data:`Replicas`; looked at when the tensor is read.
    Raises:
        CheckpointError: The parts differ in dtype or shape, or have no dimension ``dim``.
    """

    def __init__(
        self,
        parts: Sequence[StoredTensor],
        dim: int | None = None,
        reorder: Callable[[Tensor], Tensor] | None = None,
        replicas: Replicas = "equal",
    ) -> None:
        first = parts[0]
        for part in parts[1:]:
            if part.shape != first.shape or part.dtype != first.dtype:
                raise CheckpointError(
                    f"{part.file}: {part.name!r} is {_describe(part)}, but {_describe(first)} in {first.file.name}: "
                    "the shards are not of one checkpoint"
                )
        shape = list(first.shape)
        if dim is not None and len(parts) > 1:
            if dim >= len(shape):
                raise CheckpointError(f"{first.file}: {first.name!r} is {_describe(first)}, it has no dimension {dim}")
            shape[dim] *= len(parts)
        self.parts = tuple(parts)
        self.stored_bytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
        self.dim = dim if len(parts) > 1 else None
        self.shape = tuple(shape)
        self.dtype = first.dtype
        self._reorder = reorder
        self._replicas = replicas

    def _check_replicas(self) -> None:
        if self._replicas == "first" or self.dim is not None or len(self.parts) == 1:
            return
        first = self.parts[0].view()
        for part in self.parts[1:]:
            if not bitwise_equal(first, part.view()):
                raise CheckpointError(
                    f"{part.file}: {part.name!r} should be the same in every shard but differs from "
                    f"{self.parts[0].file.name}; pass replicas='first' to take the first shard's"
                )

    def read(self) -> Tensor:
        """The whole tensor: a view of mapped memory, or one new tensor where slices are joined.

        Raises:
            CheckpointError: Copies of one tensor differ between shards.
        """
        self._check_replicas()
        if self.dim is None:
            tensor = self.parts[0].view()
        else:
            tensor = torch.cat([part.view() for part in self.parts], dim=self.dim)
        return self._reorder(tensor) if self._reorder else tensor

    def copy_into(self, out: Tensor) -> None:
        """Write the tensor into ``out`` (its device and dtype), slice by slice, without a joined copy in between.

        Shape:
            out: as ``shape``
        Raises:
            CheckpointError: Copies of one tensor differ between shards.
        """
        if self.dim is None or self._reorder:
            out.copy_(self.read())
            return
        width = self.parts[0].shape[self.dim]
        for index, part in enumerate(self.parts):
            out.narrow(self.dim, index * width, width).copy_(part.view())


def _describe(part: StoredTensor) -> str:
    return f"{list(part.shape)} {str(part.dtype).removeprefix('torch.')}"


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
    errors: list[str] | None = None,
) -> tuple[dict[str, MergedTensor], dict[str, MergedTensor]]:
    """Join tensor-parallel shards by name.

    Args:
        folder: For messages.
        shards: The tensors of each file, in order.
        key_map: The format's names.
        replicas: See :data:`Replicas`.
        split_dim: Which dimension is split.
        errors: Takes up what would be raised, for a caller who has more to say.
    Returns:
        Tensors under canonical names; those of the unused group under their own names.
    Raises:
        CheckpointError: Every name that a shard lacks or that nothing knows, and every slice that does not fit.
    """
    named: dict[str, MergedTensor] = {}
    unused: dict[str, MergedTensor] = {}
    found_errors: list[str] = []
    names = list(dict.fromkeys(name for shard in shards for name in shard))
    for name in names:
        lacking = [next(iter(shard.values())).file.name for shard in shards if name not in shard]
        if lacking:
            found_errors.append(f"{name!r} is missing in {', '.join(lacking)}; fetch the shards again")
            continue
        parts = [shard[name] for shard in shards]
        if key_map.is_derived(name):
            continue
        found = key_map.to_ours(name)
        try:
            if key_map.is_unused(name):
                unused[name] = MergedTensor(parts, replicas=replicas)
            elif found is None:
                found_errors.append(f"{name!r} is not a name this format has")
            elif found[0] in named:
                found_errors.append(f"{name!r} is a second tensor for {found[0]!r}")
            else:
                named[found[0]] = MergedTensor(parts, split_dim(found[1], parts[0]), replicas=replicas)
        except CheckpointError as error:
            found_errors.append(str(error))
    found_errors += _copies(list(named.values()))
    if errors is None:
        raise_errors(f"{folder}: {UNFIT}", found_errors)
    else:
        errors += found_errors
    return named, unused


_COMPARED_ROWS = 4  # of every slice, before whole slices are compared; our choice


def _copies(tensors: Sequence[MergedTensor]) -> list[str]:
    """Every pair of shards that hold the same slice of everything, which is one shard twice.

    Slices of a constant tensor are equal by right. The first rows tell healthy shards apart: hardly anything is read.
    """
    split = [tensor.parts for tensor in tensors if tensor.dim is not None and all(tensor.shape)]
    errors = []
    for one, two in combinations(range(len(split[0]) if split else 0), 2):
        heads = ((_head(parts[one]), _head(parts[two])) for parts in split)
        same = list(takewhile(lambda pair: bitwise_equal(*pair), heads))
        if len(same) < len(split) or all(_is_constant(head) for head, _ in same):
            continue
        if all(bitwise_equal(parts[one].view(), parts[two].view()) for parts in split):
            first, second = split[0][one].file, split[0][two].file
            errors.append(f"{second.name} is a copy of {first.name}: every slice is the same; fetch both again")
    return errors


def _is_constant(tensor: Tensor) -> bool:
    return bitwise_equal(tensor, tensor.flatten()[:1].expand_as(tensor))


def _head(part: StoredTensor) -> Tensor:
    """The first rows of a slice."""
    tensor = part.view()
    return tensor.flatten(0, -2)[:_COMPARED_ROWS] if tensor.ndim > 1 else tensor


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
    """The slice of ``tensor`` that shard ``rank`` of ``count`` holds; a view.

    Shape:
        tensor: any
        return: the same with ``1 / count`` of dimension ``dim`` (None: the whole tensor)
    """
    if dim is None or count == 1:
        return tensor
    width = tensor.shape[dim] // count
    return tensor.narrow(dim, rank * width, width)
