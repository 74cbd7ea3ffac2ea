"""Finding out what a folder holds, and opening it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sphinxkit.atomic import clean_leftovers
from sphinxkit.checkpoint.entries import Replicas
from sphinxkit.checkpoint.hf import CONFIG_NAME, open_hf
from sphinxkit.checkpoint.lla2acc import find_shards
from sphinxkit.checkpoint.meta import find_meta_shards, open_meta
from sphinxkit.checkpoint.native import is_native, open_native
from sphinxkit.checkpoint.reader import Checkpoint
from sphinxkit.checkpoint.released import open_released
from sphinxkit.errors import CheckpointError

Format = Literal["sphinxkit", "sphinx", "meta", "hf"]
FORMATS: tuple[Format, ...] = ("sphinxkit", "sphinx", "meta", "hf")


def detect(folder: Path) -> list[Format]:
    """The formats whose files lie in a folder.

    Raises:
        CheckpointError: Shards are missing, or an index is damaged.
    """
    found: list[Format] = []
    if is_native(folder):
        found.append("sphinxkit")
    if find_shards(folder):
        found.append("sphinx")
    if find_meta_shards(folder):
        found.append("meta")
    names = {path.name for path in folder.iterdir()}
    weights = any(n.startswith("model") and n.endswith((".safetensors", ".safetensors.index.json")) for n in names)
    weights |= any(n.startswith("pytorch_model") and n.endswith((".bin", ".bin.index.json")) for n in names)
    if weights and CONFIG_NAME in names and "sphinxkit" not in found:
        found.append("hf")
    return found


def open_checkpoint(
    path: str | Path,
    *,
    format: Format | None = None,
    replicas: Replicas = "equal",
    verify: bool = False,
    llama_type: str | None = None,
    delta: bool = False,
    defer_faults: bool = False,
) -> Checkpoint:
    """Open a checkpoint folder of any readable format; tensors are read lazily, under canonical names.

    Exported as ``sphinxkit.checkpoint.open``. Use it in a ``with`` block.

    Args:
        path: A folder: sphinxkit's own, released SPHINX (any number of shards), Meta's or Hugging Face's Llama.
        format: One of ``FORMATS``, where a folder holds several; None finds out.
        replicas: What to do with tensors that every shard holds whole: "equal" insists that they agree, "first" takes
            the first shard's.
        verify: Whether to check checksums (SHA-256 of our own files, CRC-32 in torch files); reads everything once.
            ``Checkpoint.verifying`` does it beside the reading.
        llama_type: For a released directory without ``meta.json``.
        delta: Open ``consolidated.NN-of-MM.model-diff.pth``: differences to a base model, under canonical names.
        defer_faults: Keep names and shapes that do not fit the format in ``Checkpoint.faults``, for a caller (such as
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
        clean_leftovers(folder)  # a writer that was killed half-way may have left the old folder aside
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder that it lies in")
    opened = _open(folder, format, replicas, llama_type, delta, defer_faults)
    if verify:
        opened.verify()
    return opened


def _open(
    folder: Path, format: Format | None, replicas: Replicas, llama_type: str | None, delta: bool, defer: bool
) -> Checkpoint:
    if delta:
        return open_released(folder, replicas, llama_type, "model-diff", defer)
    if format is None:
        found = detect(folder)
        if not found:
            raise CheckpointError(_nothing_found(folder))
        if len(found) > 1:
            raise CheckpointError(f"{folder}: holds checkpoints in several formats; pass format= one of {found}")
        format = found[0]
    if format == "sphinxkit":
        if not is_native(folder):
            raise CheckpointError(f"{folder}: is not in sphinxkit's own format")
        return open_native(folder)
    if format == "sphinx":
        return open_released(folder, replicas, llama_type, defer=defer)
    if format == "meta":
        return open_meta(folder, replicas, defer)
    if format == "hf":
        return open_hf(folder, defer)
    raise CheckpointError(f"unknown checkpoint format {format!r}; known: {', '.join(FORMATS)}")


def _nothing_found(folder: Path) -> str:
    if find_shards(folder, "model-diff"):
        return (
            f"{folder}: holds only differences to a base model (*.model-diff.pth); apply them to the base first, or "
            "open with delta=True"
        )
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return (
        f"{folder}: no checkpoint in it. Expected sphinxkit's index, consolidated.NN-of-MM.model.pth, "
        f"consolidated.NN.pth or model.safetensors / pytorch_model.bin with config.json; found {names}"
    )
