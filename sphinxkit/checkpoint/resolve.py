"""From what a user writes to the local folder of a checkpoint: a path, or one on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sphinxkit import hub

_TEXTS = ("*.json", "*.yaml", "tokenizer.model")
_WEIGHTS = ("*.safetensors", "*.pth")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint, fetched from the hub if it is named ``hf://org/repo[@revision][/folder]``.

    Files that are in the local cache are not fetched again, and without a network (or with ``HF_HUB_OFFLINE=1``) the
    cache alone is used.

    Args:
        path_or_hub_id: A path, or a hub id with the ``hf://`` in front.
    Raises:
        CheckpointError: No such folder; a malformed id; or the hub cannot be asked and the cache does not have it.
    """
    return hub.resolve(path_or_hub_id, _TEXTS, _WEIGHTS, fallback=("*.bin",))
