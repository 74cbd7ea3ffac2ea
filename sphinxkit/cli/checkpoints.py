"""What a command's CHECKPOINT means: a directory, a hub repository, or the model that comes with sphinxkit."""

from __future__ import annotations

NANO = "nano"
"""Names SPHINX-nano wherever a command takes a checkpoint; a directory of that name is ``./nano``."""


def find_checkpoint(name: str) -> str:
    """The directory or ``hf://org/repo`` that a command's CHECKPOINT names.

    Args:
        name: As the user wrote it; ``nano`` is SPHINX-nano.
    Raises:
        CheckpointError: It is ``nano``, and this installation was made without the weights.
    """
    if name != NANO:
        return name
    from sphinxkit import nano

    return str(nano.path())


def tell_checkpoint(name: str) -> str:
    """The weights' name in the record of a run; SPHINX-nano's includes which release of the weights it is.

    Args:
        name: As the user wrote it.
    """
    if name != NANO:
        return name
    from sphinxkit import nano
    from sphinxkit.tensor_files.checksums import file_sha256

    index = nano.path() / "model.safetensors.index.json"  # it holds the checksum of every file
    return f"{nano.NAME} {file_sha256(index)[:16]}"
