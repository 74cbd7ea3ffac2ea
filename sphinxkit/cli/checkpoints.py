"""Resolves a command's CHECKPOINT: a directory, a hub repository, or the built-in model."""

from __future__ import annotations

NANO = "nano"
"""Names SPHINX-nano wherever a command takes a checkpoint; a directory of that name is ``./nano``."""


def find_checkpoint(name: str) -> str:
    """Resolve a command's CHECKPOINT to a directory or ``hf://org/repo``.

    Args:
        name: The argument; ``nano`` is SPHINX-nano.
    Raises:
        CheckpointError: It is ``nano``, and this installation lacks the weights.
    """
    if name != NANO:
        return name
    from sphinxkit import nano

    return str(nano.path())


def tell_checkpoint(name: str) -> str:
    """Name of the weights in a run's record; for SPHINX-nano it includes the weights' release.

    Args:
        name: The argument.
    """
    if name != NANO:
        return name
    from sphinxkit import nano
    from sphinxkit.tensor_files.checksums import file_sha256

    index = nano.path() / "model.safetensors.index.json"  # it holds the checksum of every file
    return f"{nano.NAME} {file_sha256(index)[:16]}"
