"""One file of tensors, or the several that an index names, opened by path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.lazy import LazySource, StoredTensor
from sphinxkit.tensor_files.safetensors import read_safetensors
from sphinxkit.tensor_files.torch_zip import read_torch_file

_INDEX = ".index.json"  # Hugging Face's: {"weight_map": {tensor: file}}
_SAFETENSORS = ".safetensors"


class TensorFiles(LazySource[StoredTensor]):
    """The tensors of one or several files under their own names. Made by :func:`sphinxkit.tensor_files.open`.

    Args:
        tensors: Name to tensor, in the files' order.
        files: The files.
        label: The path that was opened, for messages.
    Attributes:
        files: As above.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], files: Sequence[Path], label: str) -> None:
        super().__init__(tensors, label)
        self.files = tuple(files)


def open_tensor_files(path: str | Path) -> TensorFiles:
    """Open a file of tensors, or the index of several; tensors are read lazily, under their own names.

    Exported as ``sphinxkit.tensor_files.open``. Use it in a ``with`` block.

    Args:
        path: A ``.safetensors`` file, a file of ``torch.save`` (read with ``weights_only=True``; a single ``model`` or
            ``state_dict`` level around the tensors is looked through), or a ``*.index.json`` beside the files it names.
    Raises:
        CheckpointError: There is no such file, it is damaged or holds code, or the files and their index disagree.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give a file of tensors or its *{_INDEX}")
    tensors, files = read_tensor_files(path)
    return TensorFiles(tensors, files, str(path))


def read_tensor_files(
    path: Path, is_optional: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, StoredTensor], list[Path]]:
    """The tensors of one file, or of the files that an index names, none of them read yet; and those files.

    Args:
        path: A ``.safetensors`` or torch file, or a ``*.index.json``.
        is_optional: Whether the files may hold a tensor of this name that their index does not list, or lack one that
            it does.
    Raises:
        CheckpointError: Damaged files, a tensor that is in two of them, or an index that is not true.
    """
    if not path.name.endswith(_INDEX):
        return _read_file(path), [path]
    indexed = _indexed_files(path)
    files = [path.parent / file for file in sorted(indexed)]
    stored: dict[str, StoredTensor] = {}
    errors: list[str] = []
    for file in files:
        tensors = _read_file(file)
        errors += [f"{name!r} is in {stored[name].file.name} and in {file.name}" for name in tensors if name in stored]
        stored |= tensors
    listed = {name for names in indexed.values() for name in names}
    errors += [
        f"{name!r} is in {tensor.file.name} but not in {path.name}"
        for name, tensor in stored.items()
        if name not in listed and not is_optional(name)
    ]
    for file_name, names in indexed.items():
        errors += [
            f"{name!r} should be in {file_name} but is not"
            for name in names
            if (stored[name].file.name != file_name if name in stored else not is_optional(name))
        ]
    raise_errors(f"{path.parent}: the files do not fit together", errors)
    return stored, files


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return read_safetensors(path)[0] if path.suffix == _SAFETENSORS else read_torch_file(path)


def _indexed_files(index: Path) -> dict[str, list[str]]:
    """The files of an ``*.index.json`` and the tensors it says they hold."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    found: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        found.setdefault(file, []).append(name)
    outside = [file for file in found if Path(file).name != file]
    raise_errors(f"{index}: names files outside its folder", outside)
    missing = [file for file in sorted(found) if not (index.parent / file).is_file()]
    raise_errors(f"{index.parent}: files that {index.name} names are missing; fetch them", missing)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: It cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested without end
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object")
    return content
