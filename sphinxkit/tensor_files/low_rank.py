"""LoRA's update of a matrix: the one place of its formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphinxkit.tensor_files.lazy import LazyTensor


def lora_scale(rank: int, alpha: float) -> float:
    """Scale of a LoRA update: ``alpha / rank``. Used in the layer and in every merge.

    Args:
        rank: Rank R of the update.
        alpha: The setting of this name.
    Source: LoRA, arXiv:2106.09685, section 4.1.
    """
    return alpha / rank


def add_update(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``weight + scale * up @ down``, computed in float32 and rounded once.

    Args:
        weight: The frozen matrix.
        down: LoRA's A.
        up: LoRA's B.
        scale: See :func:`lora_scale`.
    Shape:
        weight: (out, in)
        down: (R, in)
        up: (out, R)
        return: (out, in), in the dtype of ``weight``
    """
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


@dataclass(frozen=True)
class Update:
    """A stored LoRA update.

    Attributes:
        down: LoRA's A, (R, in).
        up: LoRA's B, (out, R).
        scale: See :func:`lora_scale`.
    """

    down: LazyTensor
    up: LazyTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class UpdatedTensor:
    """A stored matrix plus a stored update; a :class:`~sphinxkit.tensor_files.lazy.LazyTensor`.

    Attributes:
        base: The frozen matrix, (out, in).
        update: Of the same shape.
    """

    base: LazyTensor
    update: Update

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix."""
        return self.base.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading takes from the files."""
        return self.base.stored_bytes + self.update.down.stored_bytes + self.update.up.stored_bytes

    def read(self) -> Tensor:
        """The merged matrix."""
        return add_update(self.base.read(), self.update.down.read(), self.update.up.read(), self.update.scale)

    def copy_into(self, out: Tensor) -> None:
        """Write the merged matrix into ``out``, rounded once to the dtype of ``out``.

        Shape:
            out: as ``shape``
        """
        update = self.update
        out.copy_(add_update(self.base.read().float(), update.down.read(), update.up.read(), update.scale))
