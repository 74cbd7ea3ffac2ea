"""Deltas between a base model and a tuned model.

A delta holds ``tuned - base`` for the tensors that both have and the tensor itself for those that only the tuned model
has, as the public implementation's ``consolidated.NN-of-MM.model-diff.pth`` files do.

Source: LLaMA2-Accessory, accessory/tools/weight_operate.py.
"""

from __future__ import annotations

from typing import Literal

import torch

from sphinxkit.errors import CheckpointError, list_errors
from sphinxkit.interpolation.methods.linear import Linear
from sphinxkit.interpolation.stream import MixedSource
from sphinxkit.tensor_source import TensorSource


def delta_source(
    base: TensorSource,
    tuned: TensorSource,
    *,
    dtype: torch.dtype | Literal["first"] = "first",
    allow_nonfinite: bool = False,
    hash_inputs: bool = False,
) -> MixedSource:
    """The delta of ``tuned`` over ``base``, as a lazy source.

    The difference is taken in float32 and rounded to ``dtype``; with 16 bits, adding it back can miss a tuned value by
    a rounding of the difference. float32 deltas of 16-bit models are restored exactly but for rare double roundings.

    Args:
        base: The model before tuning.
        tuned: The model after tuning.
        dtype: Dtype of the delta; "first" is that of the tuned model.
        allow_nonfinite: Allow NaN and Inf.
        hash_inputs: Hash both as they are read, see :meth:`MixedSource.input_hashes`.
    Shape:
        of one name: all the same, any
    Raises:
        CheckpointError: The base holds tensors that the tuned model lacks, or shapes differ.
    """
    lost = sorted(set(base.keys()) - set(tuned.keys()))
    if lost:
        raise CheckpointError(list_errors("a delta cannot take away tensors that only the base holds", lost))
    return MixedSource(
        [tuned, base],
        Linear(),
        (1, -1),
        dtype=dtype,
        names=("tuned", "base"),
        allow_nonfinite=allow_nonfinite,
        extrapolate=True,
        hash_inputs=hash_inputs,
        missing="keep",
    )


def restored_source(
    base: TensorSource,
    delta: TensorSource,
    *,
    dtype: torch.dtype | Literal["first"] = "first",
    allow_nonfinite: bool = False,
    hash_inputs: bool = False,
) -> MixedSource:
    """``base + delta`` as a lazy source; tensors that only one of them holds are taken as they are.

    Args:
        base: The model before tuning.
        delta: From :func:`delta_source` or the public implementation.
        dtype: Dtype of the result; "first" is that of the base.
        allow_nonfinite: Allow NaN and Inf.
        hash_inputs: Hash both as they are read, see :meth:`MixedSource.input_hashes`.
    Shape:
        of one name: all the same, any
    Raises:
        CheckpointError: Shapes differ: the delta belongs to another base.
    """
    return MixedSource(
        [base, delta],
        Linear(),
        (1, 1),
        dtype=dtype,
        names=("base", "delta"),
        allow_nonfinite=allow_nonfinite,
        extrapolate=True,
        hash_inputs=hash_inputs,
        missing="keep",
    )
