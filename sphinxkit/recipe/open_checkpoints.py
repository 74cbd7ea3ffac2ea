"""Opening several checkpoints at once, and looking at all that they hold."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sphinxkit import checkpoint
from sphinxkit.checkpoint import Checkpoint
from sphinxkit.interpolation import MixedSource
from sphinxkit.interpolation.sources import JoinedSource

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


def with_total(progress: Progress | None, mixed: MixedSource) -> Callable[[str, int], None] | None:
    """``progress`` for ``checkpoint.save``, which does not know the bytes of all tensors."""
    if progress is None:
        return None
    total = sum(math.prod(outcome.shape) * outcome.dtype.itemsize for outcome in mixed.outcomes.values())
    return lambda key, num_bytes: progress(key, num_bytes, total)
