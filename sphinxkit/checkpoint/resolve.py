"""Resolves a path or Hugging Face hub id to the local folder of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from sphinxkit import hub

_TEXTS = ("*.json", "*.yaml", "*.jinja", "tokenizer.model")
_WEIGHTS = ("*.safetensors", "*.pth")
_FALLBACK = ("*.bin",)


def resolve(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint, fetched from the hub if it is named ``hf://org/repo[@revision][/folder]``.

    Files that are in the local cache are not fetched again, and without a network (or with ``HF_HUB_OFFLINE=1``) the
    cache alone is used.

    Args:
        path_or_hub_id: A path, a hub id with the ``hf://`` in front, or ``"nano"``, SPHINX-nano, which comes with the
            package; a directory of that name is ``./nano`` or a ``Path``.
    Raises:
        CheckpointError: No such folder; a malformed id; or the hub cannot be asked and the cache does not have it.
    """
    if hub.is_nano(path_or_hub_id):
        return hub.nano_folder()
    place = path_or_hub_id if isinstance(path_or_hub_id, str) else Path(path_or_hub_id)
    return hub.resolve(place, _TEXTS, _WEIGHTS, _FALLBACK)


def wanted_files(names: Collection[str], folder: str = "") -> list[str]:
    """Of the files of a repository those that :func:`resolve` fetches for a checkpoint.

    Args:
        names: Of all files.
        folder: That the checkpoint lies in; "" for the repository itself.
    """
    here = [name for name in names if PurePosixPath(name).parent == PurePosixPath(folder or ".")]
    weights = [name for name in here if any(PurePosixPath(name).match(pattern) for pattern in _WEIGHTS)]
    patterns = _TEXTS if weights else (*_TEXTS, *_FALLBACK)
    return weights + [name for name in here if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
