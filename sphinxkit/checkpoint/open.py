"""Detects the format of a folder and opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinxkit.atomic import put_back
from sphinxkit.checkpoint.formats import Format, OpenOptions, get_format, names
from sphinxkit.checkpoint.formats.peft import Adapter, is_adapter
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import Replicas
from sphinxkit.errors import CheckpointError
from sphinxkit.hub import NANO
from sphinxkit.registry import suggest


def detect(folder: Path) -> list[str]:
    """The formats whose files lie in a folder.

    Raises:
        CheckpointError: Shards are missing, or an index is damaged.
    """
    return [format.name for format in _formats() if format.detect(folder)]


def _formats() -> list[Format]:
    return [get_format(name) for name in names()]


def open_checkpoint(
    path: str | Path,
    *,
    format: str | None = None,
    replicas: Replicas = "equal",
    verify: bool = False,
    llama_type: str | None = None,
    delta: bool = False,
    defer_errors: bool = False,
) -> Checkpoint:
    """Open a checkpoint folder of any readable format; tensors are read lazily, under canonical names.

    Exported as ``sphinxkit.checkpoint.open``. Use it in a ``with`` block.

    Args:
        path: A folder: sphinxkit's own, released SPHINX (any number of shards), Meta's or Hugging Face's Llama, or a
            PEFT adapter whose base lies where its configuration says.
        format: A name of ``checkpoint.formats``, where a folder holds several; None finds out.
        replicas: What to do with tensors that every shard holds whole: "equal" insists that they agree, "first" takes
            the first shard's.
        verify: Whether to check checksums (SHA-256 of our own files, CRC-32 in torch files); reads everything once.
            ``Checkpoint.verifying`` does it beside the reading.
        llama_type: Type of a released directory; counts before its ``meta.json``.
        delta: Open ``consolidated.NN-of-MM.model-diff.pth``: differences to a base model, under canonical names.
        defer_errors: Keep names and shapes that do not fit the format in ``Checkpoint.errors``, for a caller (such as
            :func:`~sphinxkit.checkpoint.load_into`) that knows of more and raises one error.
    Returns:
        The opened checkpoint: keys, shape, dtype, read, recipe, tokenizer_path, unused.
    Raises:
        CheckpointError: No checkpoint there, several, or one that is damaged, unsafe, incomplete or not supported;
            the message names the file or key and the fix.
    """
    if replicas not in ("equal", "first"):
        raise CheckpointError(f"replicas={replicas!r}: expected 'equal' or 'first'")
    folder = Path(path)
    if not folder.exists():
        put_back(folder)  # a writer that was killed half-way may have left the old folder aside
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder{suggest(str(folder), [NANO])}")
    if not folder.is_dir():
        is_picture = folder.suffix.lower() in (".jpeg", ".jpg", ".png", ".webp")
        advice = "a picture goes into image=" if is_picture else "give the folder that it lies in"
        raise CheckpointError(f"{folder}: is a file; {advice}")
    if format is None and not delta and is_adapter(folder):
        return _with_its_base(folder)
    options = OpenOptions(replicas, llama_type, delta, defer_errors)
    opened = get_format(_only_format(folder, delta) if format is None else format).open(folder, options)
    if verify:
        opened.verify()
    return opened


def overlay(source: Checkpoint, path: str | Path, **options: Any) -> Checkpoint:
    """Lay a tuned folder over an opened checkpoint.

    Args:
        source: The base.
        path: A checkpoint that may hold a part of the tensors, or a PEFT adapter, whose updates are merged.
        **options: As for :func:`open_checkpoint`.
    Returns:
        Both as one; it closes the files of both.
    Raises:
        CheckpointError: The folder cannot be read, or does not fit the base.
    """
    if is_adapter(Path(path)):
        return Adapter(path).laid_over(source)
    return source.overlaid(open_checkpoint(path, **options))


def _with_its_base(folder: Path) -> Checkpoint:
    adapter = Adapter(folder)
    base = Path(adapter.base)
    if not adapter.base or not base.is_dir():
        raise CheckpointError(
            f"{folder}: is a PEFT adapter; its base {adapter.base!r} is no folder here; "
            f"open the base with overlay={str(folder)!r}"
        )
    return adapter.laid_over(open_checkpoint(base))


def _only_format(folder: Path, is_delta: bool) -> str:
    if is_delta:
        able = sorted(
            _formats(), key=lambda format: (format.detect_delta(folder), format.has_deltas, format.has_shards)
        )
        return able[-1].name
    found = detect(folder)
    if not found:
        raise CheckpointError(_nothing_found(folder))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds checkpoints in several formats; pass format= one of {found}")
    return found[0]


def _nothing_found(folder: Path) -> str:
    if any(format.detect_delta(folder) for format in _formats()):
        return (
            f"{folder}: holds only differences to a base model (*.model-diff.pth); apply them to the base first, or "
            "open with delta=True"
        )
    expected = ", ".join(format.looks_like for format in _formats() if format.is_canonical)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return f"{folder}: no checkpoint in it. Expected one of: {expected}; found {found}"
