"""sphinxkit's own layout: sharded safetensors in canonical names, an index, ``recipe.yaml``, the tokenizer.

The index is the usual ``model.safetensors.index.json`` (so other tools can read the tensors); its ``metadata`` adds
``format: sphinxkit`` and each file's size and SHA-256. The unused group of released files lies in
``unused.safetensors`` under its original names.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.llm_config import embedding_rows
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.verify import DAMAGED
from sphinxkit.checkpoint.writing import (
    Piece,
    TensorInput,
    Texts,
    WriteOptions,
    json_text,
    specs_of,
    write_safetensors_shards,
)
from sphinxkit.checkpoint.yaml_limits import make_yaml, read_yaml_text
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.checksums import Check
from sphinxkit.tensor_files.files import read_json, read_tensor_files
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.safetensors import read_safetensors, write_safetensors
from sphinxkit.tensor_files.spec import WrittenFile

INDEX_NAME = "model.safetensors.index.json"
UNUSED_NAME = "unused.safetensors"
RECIPE_NAME = "recipe.yaml"
NAME = "sphinxkit"
VERSION = 1


def is_native(folder: Path) -> bool:
    """Whether the folder's index says that it is sphinxkit's own.

    Raises:
        CheckpointError: The index is damaged.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return False
    metadata = read_json(index).get("metadata")
    return isinstance(metadata, dict) and metadata.get("format") == NAME


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    raise_errors(f"{folder}: files that the index names are missing; fetch them", missing)
    errors = []
    for name, facts in files.items():
        size = (folder / name).stat().st_size
        if size != facts["size"]:
            errors.append(f"{name} has {size} bytes, the index says {facts['size']}")
    if any(error.startswith(f"{RECIPE_NAME} ") for error in errors):
        errors.append(f"(to use another recipe, leave {RECIPE_NAME} as it was and pass recipe=)")
    raise_errors(f"{folder}: {DAMAGED}", errors)


def _checks(folder: Path, files: dict[str, Any]) -> list[Check]:
    """The small files first, then the tensors' in their order."""
    ordered = sorted(files, key=lambda name: (name.endswith(".safetensors"), name == UNUSED_NAME, name))
    checks = []
    for name in ordered:
        size, digest = files[name]["size"], files[name]["sha256"]
        if digest:
            checks.append(Check(folder / name, 0, size, "sha256", digest, f"{name} does not match its SHA-256"))
    return checks


def _read_recipe(path: Path) -> dict[str, Any] | str:
    import yaml

    if not path.is_file():
        return f"there is no {RECIPE_NAME}, so the model's structure is not known; give a recipe"
    try:
        content = make_yaml(read_yaml_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a recipe")
    return content


@register(NAME)
class Native(Format):
    """sphinxkit's own layout."""

    name = NAME
    looks_like = "sphinxkit's index"
    has_unused = True
    has_options = True
    may_pad_vocabulary = True

    def detect(self, folder: Path) -> bool:
        """Whether the folder's index says that it is sphinxkit's own."""
        return is_native(folder)

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder with ``model.safetensors.index.json`` and the files that it names.

        Raises:
            CheckpointError: Missing, truncated or changed files, an index that is not true, a damaged ``recipe.yaml``,
                a tokenizer of the wrong size, or a layout of a later version.
        """
        if not is_native(folder):
            raise CheckpointError(f"{folder}: is not in sphinxkit's own format")
        index = folder / INDEX_NAME
        metadata = read_json(index)["metadata"]
        if metadata.get("version") != VERSION:
            raise CheckpointError(
                f"{index}: layout version {metadata.get('version')!r}, this sphinxkit reads {VERSION}; update it"
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
        unused: dict[str, StoredTensor] = {}
        if UNUSED_NAME in facts:
            unused, _ = read_safetensors(folder / UNUSED_NAME)
            files.append(folder / UNUSED_NAME)
        return Checkpoint(
            folder,
            NAME,
            tensors,
            files,
            unused,
            _read_recipe(folder / RECIPE_NAME),
            self.tokenizer(folder, embedding_rows(tensors)),
            {key: value for key, value in metadata.items() if key != "files"} | {"files": facts},
            partial(_checks, folder, facts),
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write ``model*.safetensors``, the unused group in a file of its own, the index and the recipe."""
        pieces = [Piece(spec, spec.name) for spec in specs_of(source)]
        weight_map, written = write_safetensors_shards(
            folder, source, pieces, options.max_shard_bytes, options.checksum
        )
        if unused is not None:
            written[UNUSED_NAME] = write_safetensors(
                folder / UNUSED_NAME, specs_of(unused), unused.read, checksum=options.checksum, chunks=unused.chunks
            )
        recipe_yaml = options.recipe_yaml
        if recipe_yaml is None and options.recipe is not None:
            import yaml

            recipe_yaml = yaml.safe_dump(dict(options.recipe), sort_keys=False)
        texts = {} if recipe_yaml is None else {RECIPE_NAME: recipe_yaml}
        small = {name: text.encode() for name, text in texts.items()} | dict(options.tokenizer)
        for name, content in small.items():
            written[name] = WrittenFile(len(content), hashlib.sha256(content).hexdigest() if options.checksum else "")
        metadata = {
            "format": NAME,
            "version": VERSION,
            "total_size": sum(piece.spec.num_bytes for piece in pieces),
            "files": {
                name: {"size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
                for name, file in written.items()
            },
        }
        return {INDEX_NAME: json_text({"metadata": metadata, "weight_map": weight_map}), **texts}
