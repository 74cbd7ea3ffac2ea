"""Opens several checkpoints and lists all their tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from sphinxkit import checkpoint
from sphinxkit.checkpoint import Checkpoint
from sphinxkit.interpolation.sources import JoinedSource
from sphinxkit.tensor_source import TensorSource

LLM = "llm."  # names of the language model's tensors begin with it

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, its bytes, and the bytes of all tensors, when the tensor is done."""


def open_all(paths: Sequence[str | os.PathLike[str]], stack: ExitStack) -> list[Checkpoint]:
    """Open checkpoints (directories or hub ids) that stay open until ``stack`` is left."""
    return [stack.enter_context(checkpoint.open(checkpoint.resolve(os.fspath(path)))) for path in paths]


def everything(opened: Checkpoint, llm_only: bool = False) -> JoinedSource:
    """Everything a checkpoint holds, the unused group under its original names included, or its language model."""
    return JoinedSource([opened, opened.unused], (lambda key: key.startswith(LLM)) if llm_only else None)


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
