"""A folder of safetensors under the files' own names, whatever the model: nothing in it is interpreted.

Mixes, diffs and deltas need names and shapes alone, so they work on models that no other format here knows: a LLaVA, a
Qwen-VL, a state-space model. What lies beside the tensors (configuration, tokenizer, processor, chat template,
generation settings) is copied as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.formats.hf import CONFIG_NAME, HuggingFace, find_weights, missing_index
from sphinxkit.checkpoint.formats.hf_config import NO_NUMBER, llm_from_hf
from sphinxkit.checkpoint.formats.peft import is_adapter
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import bitwise_equal
from sphinxkit.checkpoint.verify import torch_files_checks
from sphinxkit.checkpoint.writing import (
    Piece,
    TensorInput,
    Texts,
    WriteOptions,
    json_text,
    specs_of,
    write_safetensors_shards,
)
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.files import read_json, read_tensor_files
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.tokenizer_files import FILE_NAMES, choose_tokenizer

NAME = "safetensors"
_INDEX = ".safetensors.index.json"
_DELTA = "delta"  # first word of a delta's files, which no reader of models looks for
_CARRIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_OF_ANOTHER = ("provenance.json",)  # says how a model was made, which is not true of what is made of it
_LLM_CONFIGS = ("text_config", "llm_config", "language_config")  # of a vision-language model's config.json
_HEAD = "lm_head.weight"


def why_foreign(folder: Path, formats: Sequence[str]) -> str | None:
    """Why no other format reads a folder of tensors; None if one does, or if it holds no tensors.

    Args:
        folder: Existing folder.
        formats: Whose files lie in it, see :func:`sphinxkit.checkpoint.detect`.
    Raises:
        CheckpointError: The configuration is damaged.
    """
    if is_adapter(folder):  # laid over its base
        return None
    if not formats and any(folder.glob("*.safetensors")):
        return f"{folder}: its files are of no format that is read here"
    if list(formats) != [HuggingFace.name]:
        return None
    path = folder / CONFIG_NAME
    try:
        llm_from_hf(read_json(path), path, 1)
    except CheckpointError as error:
        return str(error)
    return None


def config_differences(first: Checkpoint, other: Checkpoint, *, is_renamed: bool = False) -> list[str]:
    """Where what two folders' ``config.json`` say of the model differs, as ``key: value against value``.

    Args:
        first: Of this format.
        other: The same.
        is_renamed: Whether the other is a part of the first: its language model.
    """
    ours, theirs = first.metadata["config"], other.metadata["config"]
    if is_renamed:
        ours = next((ours[key] for key in _LLM_CONFIGS if isinstance(ours.get(key), dict)), {})
    hidden = {*NO_NUMBER, "vocab_size", *(("model_type", "architectures") if is_renamed else ())}
    return [
        f"{key}: {ours[key]!r:.80} against {theirs[key]!r:.80}"
        for key in ours
        if key in theirs and key not in hidden and ours[key] != theirs[key]
    ]


@register(NAME)
class TensorFolder(Format):
    """Any folder of safetensors (or torch files), its tensors under their own names."""

    name = NAME
    looks_like = "*.safetensors of any model, for mix, diff and delta"
    has_deltas = True
    has_options = True
    is_canonical = False
    may_pad_vocabulary = True

    def detect(self, folder: Path) -> bool:
        """False: a folder is opened in this format where one asks for it."""
        del folder
        return False

    def detect_delta(self, folder: Path) -> bool:
        """Whether the folder holds differences that this format wrote."""
        return any((folder / f"{_DELTA}{end}").is_file() for end in (_INDEX, ".safetensors"))

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder, its tensors under their own names, without a head that is tied to the embedding.

        Raises:
            CheckpointError: Damaged or missing files, none at all, or one tensor in two of them.
        """
        stored, files = _read(folder, options.is_delta)
        config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
        if not options.is_delta:
            for key in _tied_heads(stored, config):
                del stored[key]
        return Checkpoint(
            folder,
            self.name,
            stored,
            files,
            recipe="is a folder of tensors under their own names, which has no recipe",
            tokenizer_path=choose_tokenizer(folder),
            metadata={"config": config},
            checks=partial(torch_files_checks, [file for file in files if file.suffix != ".safetensors"]),
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write the tensors under their names, and copy what lies beside those of the first model."""
        if options.files_of is None:
            raise CheckpointError(
                f"format {self.name!r} is for tensors under a folder's own names; write 'hf' or 'sphinxkit'"
            )
        stem = _DELTA if options.is_delta else "model"
        pieces = [Piece(spec, spec.name) for spec in specs_of(source)]
        weight_map, written = write_safetensors_shards(
            folder, source, pieces, options.max_shard_bytes, checksum=False, stem=stem
        )
        texts: Texts = {}
        if len(written) > 1:
            total = sum(piece.spec.num_bytes for piece in pieces)
            texts[f"{stem}{_INDEX}"] = json_text({"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in _beside(options.files_of):
            if not (options.tokenizer and path.name in FILE_NAMES):
                shutil.copyfile(path, folder / path.name)
        dtypes = {piece.spec.dtype for piece in pieces if piece.spec.dtype.is_floating_point}
        if (folder / CONFIG_NAME).is_file() and len(dtypes) == 1 and not options.is_delta:
            config = read_json(folder / CONFIG_NAME)
            if _set_dtype(config, dtypes.pop()):
                texts[CONFIG_NAME] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return texts


def _read(folder: Path, is_delta: bool) -> tuple[dict[str, StoredTensor], list[Path]]:
    """The tensors of a folder and their files: those of its index, or of all its safetensors."""
    if is_delta:
        found = next((path for end in (_INDEX, ".safetensors") if (path := folder / f"{_DELTA}{end}").is_file()), None)
    else:
        indices = [path for path in sorted(folder.glob(f"*{_INDEX}")) if not path.name.startswith(_DELTA)]
        found = find_weights(folder) or (indices[0] if len(indices) == 1 else None)
    if found is not None:
        return read_tensor_files(found, lambda name: name.endswith(_HEAD))
    if index := missing_index(folder):
        raise CheckpointError(index)
    files = [] if is_delta else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no safetensors")
    stored: dict[str, StoredTensor] = {}
    errors = []
    for file in files:
        tensors, _ = read_tensor_files(file)
        errors += [f"{name!r} is in {stored[name].file.name} and in {file.name}" for name in tensors if name in stored]
        stored |= tensors
    raise_errors(f"{folder}: the files do not fit together", errors)
    return stored, files


def _tied_heads(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[str]:
    """Heads that are stored although the configuration ties them to an embedding, whose copy they are."""
    parts = [config, *(config[key] for key in _LLM_CONFIGS if isinstance(config.get(key), dict))]
    if not any(part.get("tie_word_embeddings") is True for part in parts):
        return []
    heads = {key: tensor for key, tensor in stored.items() if f".{key}".endswith(f".{_HEAD}")}
    return [
        key
        for key, head in heads.items()
        if any(
            other.shape == head.shape and other.dtype == head.dtype and bitwise_equal(other.read(), head.read())
            for name, other in stored.items()
            if name not in heads
        )
    ]


def _beside(folder: Path) -> Iterator[Path]:
    """The small files of a folder that say what the model is and how it is used."""
    for path in sorted({path for pattern in _CARRIED for path in folder.glob(pattern)}):
        if path.is_file() and not path.name.endswith(".index.json") and path.name not in _OF_ANOTHER:
            yield path


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> bool:
    """Write a dtype wherever a configuration names one; whether that changed anything."""
    changed = False
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str) and part[key] != str(dtype).removeprefix("torch."):
                part[key] = str(dtype).removeprefix("torch.")
                changed = True
    return changed
