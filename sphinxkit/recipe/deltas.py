"""Deltas between a base model and a tuned model: extracting and applying."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphinxkit import checkpoint
from sphinxkit.checkpoint import Checkpoint
from sphinxkit.checkpoint.formats import TensorFolder
from sphinxkit.errors import CheckpointError
from sphinxkit.interpolation import MixedSource
from sphinxkit.interpolation.delta import delta_source, restored_source
from sphinxkit.interpolation.diff import DiffReport, compare
from sphinxkit.recipe.hf_folder import files_beside, layout_of
from sphinxkit.recipe.open_checkpoints import Progress, everything, no_new_parents, open_all, with_total
from sphinxkit.recipe.other_models import check_is_by_name
from sphinxkit.recipe.provenance import LateText, delta_provenance, restored_provenance
from sphinxkit.recipe.recipe import Recipe


@dataclass(frozen=True)
class DeltaResult:
    """What was written.

    Attributes:
        path: The directory.
        num_tensors: Number of tensors.
        num_shards: Tensor-parallel shards; None for formats that have none.
        verified: Distance of the tuned model from base + delta, if requested.
    """

    path: Path
    num_tensors: int
    num_shards: int | None
    verified: DiffReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        said = {"output": str(self.path), "tensors": self.num_tensors, "shards": self.num_shards}
        if self.verified is None:
            return said
        total = self.verified.total
        verified = {
            "identical_tensors": self.verified.num_identical,
            "max_abs": total.max_abs,
            "relative_l2": total.relative_l2,
        }
        return said | {"verified": verified}


def extract_delta(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    num_shards: int | None = None,
    verify: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> DeltaResult:
    """Write ``tuned - base`` as ``consolidated.NN-of-MM.model-diff.pth``, as the public implementation does.

    Tensors that only the tuned model has are stored whole. In 16 bit the difference is rounded; float32 is more exact.

    Args:
        base: Directory of a checkpoint, or ``hf://org/repo``.
        tuned: The same.
        output: Directory to write (atomically).
        format: "sphinx", or "safetensors" for folders of any model, by their files' own names (``delta.safetensors``);
            None: the latter where this library does not know the model.
        dtype: Dtype of the differences; None: the tuned model's.
        num_shards: None: the tuned model's, or 1.
        verify: Apply the delta and measure the distance to the tuned model.
        overwrite: Replace an existing checkpoint at ``output``.
        allow_nonfinite: Allow NaN and Inf.
        progress: Called after each written tensor with its name, its bytes and the total bytes.
    Raises:
        CheckpointError: A model cannot be opened, the two do not fit, or the output cannot be written.
    Source: LLaMA2-Accessory, accessory/tools/weight_operate.py.
    """
    target = Path(output)
    with ExitStack() as stack:
        first, second = open_all([base, tuned], stack, by_name=format == TensorFolder.name)
        layout = TensorFolder.name if check_is_by_name([first], False, format) else format or "sphinx"
        delta = delta_source(
            everything(first),
            everything(second),
            dtype=dtype or "first",
            allow_nonfinite=allow_nonfinite,
            hash_inputs=True,
        )
        shards = _shards(num_shards, second, layout)
        said = LateText(lambda: delta_provenance(first, delta))
        _write(target, delta, first, second, second, layout, shards, overwrite, progress, said, is_delta=True)
        report = None
        if verify:
            written = stack.enter_context(checkpoint.open(target, delta=True))
            restored = restored_source(everything(first), everything(written), allow_nonfinite=allow_nonfinite)
            report = compare(everything(second), restored)
    return DeltaResult(target, len(delta.outcomes), shards, report)


def apply_delta(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    num_shards: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> DeltaResult:
    """Write ``base + delta`` as a checkpoint.

    Tensors that only one of them has are copied. Base and delta may have different numbers of shards.

    Args:
        base: Directory of a checkpoint, or ``hf://org/repo``.
        delta: Directory with ``consolidated.NN-of-MM.model-diff.pth``.
        output: Directory to write (atomically).
        format: "sphinxkit", "sphinx" (as released), "meta" or "hf"; None: "sphinx", or "safetensors" for a delta of
            folders of any model.
        dtype: Dtype of the result; None: the base's, tensor by tensor.
        num_shards: None: the delta's (sphinx, meta).
        overwrite: Replace an existing checkpoint at ``output``.
        allow_nonfinite: Allow NaN and Inf.
        progress: Called after each written tensor with its name, its bytes and the total bytes.
    Raises:
        CheckpointError: One of them cannot be opened, they do not fit, the delta records another base, or the output
            cannot be written.
    """
    target = Path(output)
    with ExitStack() as stack:
        second = stack.enter_context(checkpoint.open(checkpoint.resolve(delta), delta=True))
        (first,) = open_all([base], stack, by_name=second.format == TensorFolder.name)
        if first.format != second.format and TensorFolder.name in (first.format, second.format):
            raise CheckpointError(f"{first.path}: its tensors have other names than those of the delta {second.path}")
        layout = TensorFolder.name if check_is_by_name([first], False, format) else format or "sphinx"
        result = restored_source(
            everything(first),
            everything(second),
            dtype=dtype or "first",
            allow_nonfinite=allow_nonfinite,
            hash_inputs=True,
        )
        described = second if second.has_recipe or layout == TensorFolder.name else first
        layout = layout_of(layout, described.has_recipe and "vision" in described.recipe)
        shards = _shards(num_shards, second, layout)
        recipe = Recipe.of_checkpoint(described) if described.has_recipe else None
        others = files_beside(layout, recipe, second.tokenizer_path or first.tokenizer_path)
        said = LateText(lambda: restored_provenance(first, second, result), others)
        _write(target, result, first, second, described, layout, shards, overwrite, progress, said, is_delta=False)
    return DeltaResult(target, len(result.outcomes), shards)


def _shards(given: int | None, second: Checkpoint, layout: str) -> int | None:
    """Number of tensor-parallel shards to write; as given for formats that have none, which refuse a number."""
    if not checkpoint.formats.get_format(layout).has_shards:
        return given
    return given or second.metadata.get("num_shards") or 1


def _write(
    output: Path,
    source: MixedSource,
    first: Checkpoint,
    second: Checkpoint,
    described: Checkpoint,
    format: str,
    num_shards: int | None,
    overwrite: bool,
    progress: Progress | None,
    said: LateText,
    *,
    is_delta: bool,
) -> None:
    """Write a delta or what it makes, with the recipe of ``described`` and whichever tokenizer there is."""
    for opened in (first, second):
        if output.exists() and opened.path.resolve() == output.resolve():
            raise CheckpointError(f"{output}: is one of the inputs; write the result somewhere else")
    names = {key for opened in (first, second) for key in opened.unused.keys()}  # noqa: SIM118
    unused = source.only(lambda key: key in names)
    with no_new_parents(output):
        checkpoint.save(
            output,
            source.only(lambda key: key not in names),
            format=format,
            num_shards=num_shards,
            recipe=Recipe.of_checkpoint(described).resolved() if described.has_recipe else None,
            tokenizer=None if format == TensorFolder.name else second.tokenizer_path or first.tokenizer_path,
            unused=unused if unused.keys() and checkpoint.formats.get_format(format).has_unused else None,
            overwrite=overwrite,
            progress=with_total(progress, source),
            files_of=described,
            extra_files=said,
            delta=is_delta,
        )
