"""sphinxkit's own layout: sharded safetensors in canonical names, an index, ``recipe.yaml``, ``tokenizer.model``.

The index is the usual ``model.safetensors.index.json`` (so other tools can read the tensors); its ``metadata`` adds
``format: sphinxkit`` and each file's size and SHA-256. The unused group of released files lies in
``unused.safetensors`` under its original names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import Entry
from sphinxkit.checkpoint.reader import Checkpoint, embedding_rows
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.checkpoint.verification import DAMAGED
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.checksums import Check
from sphinxkit.tensor_files.files import read_json, read_tensor_files
from sphinxkit.tensor_files.safetensors import read_safetensors

INDEX_NAME = "model.safetensors.index.json"
UNUSED_NAME = "unused.safetensors"
RECIPE_NAME = "recipe.yaml"
FORMAT_NAME = "sphinxkit"
FORMAT_VERSION = 1


def is_native(folder: Path) -> bool:
    """Whether the folder's index says that it is sphinxkit's own.

    Raises:
        CheckpointError: The index is damaged.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return False
    metadata = read_json(index).get("metadata")
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT_NAME


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    raise_errors(f"{folder}: files that the index names are missing; fetch them", missing)
    faults = []
    for name, facts in files.items():
        size = (folder / name).stat().st_size
        if size != facts["size"]:
            faults.append(f"{name} has {size} bytes, the index says {facts['size']}")
    if any(fault.startswith(f"{RECIPE_NAME} ") for fault in faults):
        faults.append(f"(to use another recipe, leave {RECIPE_NAME} as it was and pass recipe= (--recipe))")
    raise_errors(f"{folder}: {DAMAGED}", faults)


def _checks(folder: Path, files: dict[str, Any]) -> list[Check]:
    """The small files first, then the tensors' in their order."""
    ordered = sorted(files, key=lambda name: (name.endswith(".safetensors"), name == UNUSED_NAME, name))
    checks = []
    for name in ordered:
        size, digest = files[name]["size"], files[name]["sha256"]
        if digest:
            checks.append(Check(folder / name, 0, size, "sha256", digest, f"{name} does not match its SHA-256"))
    return checks


def open_native(folder: Path) -> Checkpoint:
    """Open a folder in sphinxkit's own layout.

    Args:
        folder: With ``model.safetensors.index.json`` and the files that it names.
    Raises:
        CheckpointError: Missing, truncated or changed files, an index that is not true, a damaged ``recipe.yaml``, a
            tokenizer of the wrong size, or a layout of a later version.
    """
    index = folder / INDEX_NAME
    metadata = read_json(index)["metadata"]
    if metadata.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{index}: layout version {metadata.get('version')!r}, this sphinxkit reads {FORMAT_VERSION}; update it"
        )
    try:
        facts = {
            str(name): {"size": int(f["size"]), "sha256": f.get("sha256")} for name, f in metadata["files"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{index}: its metadata has no usable list of files: {error!r}") from error
    raise_errors(f"{index}: names files outside its folder", [name for name in facts if Path(name).name != name])
    _check_files(folder, facts)
    tensors, files = read_tensor_files(index)
    entries = {name: Entry([tensor]) for name, tensor in tensors.items()}
    unused: dict[str, Entry] = {}
    if UNUSED_NAME in facts:
        unused = {name: Entry([tensor]) for name, tensor in read_safetensors(folder / UNUSED_NAME)[0].items()}
        files.append(folder / UNUSED_NAME)
    return Checkpoint(
        folder,
        FORMAT_NAME,
        entries,
        files,
        unused,
        _read_recipe(folder / RECIPE_NAME),
        find_tokenizer(folder, embedding_rows(entries)),
        {key: value for key, value in metadata.items() if key != "files"} | {"files": facts},
        partial(_checks, folder, facts),
    )


def _read_recipe(path: Path) -> dict[str, Any] | str:
    import yaml

    if not path.is_file():
        return f"there is no {RECIPE_NAME}, so the model's structure is not known; give a recipe"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a recipe")
    return content
