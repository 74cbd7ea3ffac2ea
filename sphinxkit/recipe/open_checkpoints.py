"""Opens several checkpoints and lists all their tensors."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sphinxkit import checkpoint
from sphinxkit.checkpoint import Checkpoint
from sphinxkit.checkpoint.formats import HuggingFace, TensorFolder
from sphinxkit.checkpoint.formats.tensor_folder import why_foreign
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_source import NamedSource, TensorSource, joined

LLM = "llm."  # names of the language model's tensors begin with it

_logger = logging.getLogger(__name__)

Overlay = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A tuned directory, or several."""

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, its bytes, and the bytes of all tensors, when the tensor is done."""


def open_all(
    paths: Sequence[str | os.PathLike[str]],
    stack: ExitStack,
    *,
    by_name: bool = False,
    overlays: Sequence[str | None] = (),
) -> list[Checkpoint]:
    """Open checkpoints (directories or hub ids) that stay open until ``stack`` is left.

    Where one is a folder of a model that this library does not know, all are opened under their files' own names.

    Args:
        paths: Where they are.
        stack: Closes them.
        by_name: Open all under their files' own names anyway.
        overlays: A tuned directory over each of the first ones, or None.
    Raises:
        CheckpointError: One cannot be opened, or only some of them have files that can be taken by name.
    """
    folders = [checkpoint.resolve(path) for path in paths]
    known = [checkpoint.detect(folder) if folder.is_dir() else [] for folder in folders]
    reasons = [why_foreign(folder, found) for folder, found in zip(folders, known, strict=True) if folder.is_dir()]
    reason = next(filter(None, reasons), None)
    if reason is None and not by_name:
        over = [*overlays, *[None] * (len(paths) - len(overlays))]
        pairs = zip(folders, over, strict=True)
        return [stack.enter_context(open_overlaid(folder, tuned)) for folder, tuned in pairs]
    if any(overlays):
        raise CheckpointError("overlay= needs models that this library knows; mix the folders one by one")
    for folder, found in zip(folders, known, strict=True):
        if found not in ([], [HuggingFace.name]):
            raise CheckpointError(
                f"{folder}: is of format {found[0]!r} and cannot be taken by its files' names beside a folder of any "
                f"model{f' ({reason})' if reason else ''}; convert it to format 'hf' first"
            )
    if reason is not None:
        _logger.info("models are taken by their files' own names: %s", reason)
    return [stack.enter_context(checkpoint.open(folder, format=TensorFolder.name)) for folder in folders]


def everything(opened: Checkpoint, llm_only: bool = False) -> NamedSource:
    """Everything a checkpoint holds, the unused group under its original names included, or its language model."""
    return joined([opened, opened.unused], (lambda key: key.startswith(LLM)) if llm_only else None)


@contextmanager
def open_overlaid(path: str | os.PathLike[str], overlay: Overlay | None, **options: Any) -> Iterator[Checkpoint]:
    """Open a checkpoint with tuned ones over it, whose tensors take the place of its own.

    Args:
        path: Directory or hub id.
        overlay: Tuned directories, the last counts; they may hold a part of the tensors.
        **options: As for ``checkpoint.open``.
    Raises:
        CheckpointError: One cannot be opened, or does not fit.
    """
    with ExitStack() as stack:
        source = stack.enter_context(checkpoint.open(checkpoint.resolve(path), **options))
        for tuned in as_list(overlay):
            folder = checkpoint.resolve(tuned)
            source = stack.enter_context(checkpoint.overlay(source, folder, **options))
        yield source


def as_list(overlay: Overlay | None) -> list[str | os.PathLike[str]]:
    """One directory or several as a list."""
    return [overlay] if isinstance(overlay, str | os.PathLike) else list(overlay or ())


@contextmanager
def no_new_parents(output: Path) -> Iterator[None]:
    """Remove the folders above ``output`` that were made inside of this, if it fails."""
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:  # the nearest first
            with suppress(OSError):
                parent.rmdir()
        raise


def with_total(
    progress: Progress | None, source: TensorSource, dtype: torch.dtype | None = None
) -> Callable[[str, int], None] | None:
    """``progress`` for ``checkpoint.save``, which does not know the bytes of all tensors.

    Args:
        progress: What the user gave.
        source: The tensors to be saved.
        dtype: What floating-point tensors are cast to; None: nothing.
    """
    if progress is None:
        return None
    total = 0
    for key in source.keys():  # noqa: SIM118 - a TensorSource is no mapping
        stored = source.dtype(key)
        total += math.prod(source.shape(key)) * (dtype if dtype and stored.is_floating_point else stored).itemsize
    return lambda key, num_bytes: progress(key, num_bytes, total)
