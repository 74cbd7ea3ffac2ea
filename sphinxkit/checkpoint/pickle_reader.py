"""Tensors of a ``torch.save`` file, mapped and never executed.

``weights_only=True`` holds everywhere: a pickle that asks for anything but tensors and plain containers is refused by
torch's own restricted unpickler before it can run. Files in torch's zip layout are mapped; older ones cannot be and
are read whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinxkit.checkpoint.entries import StoredTensor
from sphinxkit.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; a single ``model`` or ``state_dict`` level around them is looked through.

    Args:
        path: A ``.pth`` or ``.bin`` file.
    Raises:
        CheckpointError: The file is empty, truncated, damaged, holds code, or holds something else than tensors.
    """
    loaded = _load(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    stored: dict[str, StoredTensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a dense tensor")
        tensor = value.detach()
        stored[name] = StoredTensor(path, name, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))
    if not stored:
        raise CheckpointError(f"{path}: holds no tensors")
    return stored


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _load(path: Path) -> Any:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    is_zip = magic == _ZIP_MAGIC
    try:
        return torch.load(path, map_location="cpu", mmap=is_zip or None, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything at all
        raise CheckpointError(_explain(path, size, error)) from error


def _explain(path: Path, size: int, error: Exception) -> str:
    text = str(error)
    asked = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.[\w.]+)", text)
    if "Weights only load failed" in text and asked and "nsupported" in text:
        return (
            f"{path}: refused: its pickle asks for {asked.group(1)}, which is code and not tensors; nothing of it was "
            "executed. Get the file from a source you trust, saved as tensors only"
        )
    first = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return (
        f"{path}: not a readable torch file ({size} bytes; {type(error).__name__}: {first[:200]}): truncated, damaged "
        "or of another kind; fetch it again"
    )
