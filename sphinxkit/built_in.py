"""The name ``nano``: the checkpoint of SPHINX-nano, which comes with sphinxkit."""

from __future__ import annotations

from pathlib import Path

from sphinxkit.errors import CheckpointError

NANO = "nano"
"""As text, it names SPHINX-nano wherever a checkpoint is expected; a directory of that name is ``./nano``."""
TITLE = "SPHINX-nano"
_FOLDER = Path(__file__).resolve().parent / "nano" / "weights"
_INDEX = "model.safetensors.index.json"
_FILES = ("recipe.yaml", "tokenizer.model", _INDEX)  # and the tensors that the index names


def is_nano(name: object) -> bool:
    """Whether a checkpoint's name means SPHINX-nano; a path object never does."""
    return isinstance(name, str) and name == NANO


def as_text(folder: Path) -> str:
    """A directory's path as text; of a directory called ``nano`` it is ``./nano``."""
    return f"./{folder}" if str(folder) == NANO else str(folder)


def nano_folder() -> Path:
    """Folder of the checkpoint that comes with the package, in sphinxkit's own layout.

    Raises:
        CheckpointError: This installation was made without it; names what is missing.
    """
    missing = [name for name in _FILES if not (_FOLDER / name).is_file()]
    if not any(_FOLDER.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise CheckpointError(
            f"{_FOLDER}: this installation comes without {TITLE}'s weights (missing: {', '.join(missing)}); "
            "name another checkpoint, or train it (sphinxkit reproduce nano)"
        )
    return _FOLDER


def name_in_record(checkpoint: str | Path) -> str:
    """Name of a checkpoint in a run's record; for SPHINX-nano it includes the weights' release.

    Args:
        checkpoint: A path, a hub id or ``nano``.
    """
    if not is_nano(checkpoint):
        return str(checkpoint)
    from sphinxkit.tensor_files.checksums import file_sha256

    return f"{TITLE} {file_sha256(nano_folder() / _INDEX)[:16]}"  # the index holds the checksum of every file
