"""Hugging Face's layout of Llama: ``model*.safetensors`` or ``pytorch_model*.bin`` and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import Entry, EntrySource, StoredTensor, raise_faults
from sphinxkit.checkpoint.keymap import hf_key_map
from sphinxkit.checkpoint.lla2acc import read_json
from sphinxkit.checkpoint.llm_numbers import META_DEFAULTS, check_llm_shapes
from sphinxkit.checkpoint.meta import text_recipe
from sphinxkit.checkpoint.pickle_reader import read_pickle
from sphinxkit.checkpoint.reader import EMBEDDING, Checkpoint, embedding_rows
from sphinxkit.checkpoint.safetensors import read_safetensors
from sphinxkit.checkpoint.sharding import rotary_reorder
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.errors import CheckpointError

CONFIG_NAME = "config.json"
_HEAD = "llm.lm_head.weight"
_MAX_POSITIONS = 2048  # transformers' default of max_position_embeddings, LlamaConfig
_MAX_SEQ_LEN = 4096  # default of our llama builder


def indexed_files(index: Path) -> dict[str, list[str]]:
    """The files of an ``*.index.json`` and the tensors it says they hold.

    Raises:
        CheckpointError: The index is damaged, points out of its folder, or names files that are not there.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    found: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        found.setdefault(file, []).append(name)
    outside = [file for file in found if Path(file).name != file]
    raise_faults(f"{index}: names files outside its folder", outside)
    missing = [file for file in sorted(found) if not (index.parent / file).is_file()]
    raise_faults(f"{index.parent}: files that {index.name} names are missing; fetch them", missing)
    return found


def find_hf_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The weight files of a folder (safetensors before .bin) and their index; empty if there are none."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return [folder / file for file in sorted(indexed_files(index))], index
        single = folder / f"{stem}.{suffix}"
        if single.is_file():
            return [single], None
    return [], None


def read_files(files: list[Path], index: Path | None, verify: bool = False) -> dict[str, StoredTensor]:
    """The tensors of several files that do not overlap.

    Args:
        files: ``.safetensors`` or torch files.
        index: Their index, whose word on what lies where must hold.
        verify: Whether to check the records' checksums where the format has them.
    Raises:
        CheckpointError: Damaged files, a tensor that is in two of them, or an index that is not true.
    """
    stored: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for file in files:
        tensors = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_pickle(file, verify)
        faults += [f"{name!r} is in {stored[name].file.name} and in {file.name}" for name in tensors if name in stored]
        stored |= tensors
    if index is not None:
        for file_name, names in indexed_files(index).items():
            faults += [
                f"{name!r} should be in {file_name} but is not"
                for name in names
                if name not in stored or stored[name].file.name != file_name
            ]
    raise_faults(f"{files[0].parent}: the files do not fit together", faults)
    return stored


def llm_from_hf(config: Mapping[str, Any], file: Path, vocab_size: int) -> dict[str, Any]:
    """The recipe's ``llm`` part from a Hugging Face ``config.json``.

    Args:
        config: The file's content.
        file: For messages.
        vocab_size: Rows of the embedding.
    Raises:
        CheckpointError: Not a Llama, or a Llama with parts that this one does not have.
    """
    faults: list[str] = []
    if config.get("model_type") != "llama":
        raise CheckpointError(f"{file}: model_type is {config.get('model_type')!r}; only 'llama' can be read")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    faults += [
        f"{key!r} is {config.get(key)!r}, expected a number" for key in needed if not isinstance(config.get(key), int)
    ]
    raise_faults(f"{file} cannot be followed", faults)
    heads = config["num_attention_heads"]
    for key, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, only) != only:
            faults.append(f"{key!r} is {config[key]!r}; the model here only has {only!r}")
    if config.get("head_dim") not in (None, config["hidden_size"] // heads):
        faults.append(f"'head_dim' is {config['head_dim']!r}; here it is hidden_size / num_attention_heads")
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        faults.append(f"rotary scaling {kind!r} is not supported yet (only 'linear')")
    raise_faults(f"{file} cannot be followed", faults)
    llm: dict[str, Any] = {
        "type": "llama",
        "vocab_size": vocab_size,
        "embed_dim": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "hidden_dim": config["intermediate_size"],
    }
    if config.get("num_key_value_heads") not in (None, heads):
        llm["num_kv_heads"] = config["num_key_value_heads"]
    positions = config.get("max_position_embeddings", _MAX_POSITIONS)
    if positions != _MAX_SEQ_LEN:
        llm["max_seq_len"] = positions
    norm_eps = config.get("rms_norm_eps", 1e-6)  # transformers' default
    if norm_eps != META_DEFAULTS["norm_eps"]:
        llm["norm_eps"] = norm_eps
    theta = config.get("rope_theta", rope.get("rope_theta", META_DEFAULTS["rope_theta"]))
    if theta != META_DEFAULTS["rope_theta"]:
        llm["rope_theta"] = float(theta)
    if kind == "linear":
        llm["rope_scaling"] = 1.0 / float(rope["factor"])  # there positions are divided by it, here multiplied
    return {**llm, "attention": "auto"}


def hf_from_numbers(numbers: Mapping[str, Any], max_seq_len: int, dtype: str) -> dict[str, Any]:
    """A ``config.json`` for transformers' ``LlamaForCausalLM``.

    Args:
        numbers: What :func:`sphinxkit.checkpoint.llm_numbers.full_numbers` gives.
        max_seq_len: Longest sequence.
        dtype: Of the weights: "float32".
    """
    scaling = numbers["rope_scaling"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": numbers["embed_dim"],
        "intermediate_size": numbers["hidden_dim"],
        "num_hidden_layers": numbers["num_layers"],
        "num_attention_heads": numbers["num_heads"],
        "num_key_value_heads": numbers["num_kv_heads"],
        "vocab_size": numbers["vocab_size"],
        "max_position_embeddings": max_seq_len,
        "rms_norm_eps": numbers["norm_eps"],
        "rope_theta": numbers["rope_theta"],
        "rope_scaling": None if scaling is None else {"rope_type": "linear", "factor": 1.0 / scaling},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def open_hf(folder: Path, verify: bool = False) -> Checkpoint:
    """Open a folder in Hugging Face's layout.

    Args:
        folder: With weight files and ``config.json``.
        verify: Whether to check the checksums of ``.bin`` records.
    Raises:
        CheckpointError: Damaged or missing files, not a Llama, names or shapes that do not fit.
    """
    files, index = find_hf_files(folder)
    config_path = folder / CONFIG_NAME
    if not files or not config_path.is_file():
        raise CheckpointError(f"{folder}: needs model.safetensors or pytorch_model.bin, and {CONFIG_NAME}")
    config = read_json(config_path)
    stored = read_files(files, index, verify)
    if "model.embed_tokens.weight" not in stored:
        raise CheckpointError(f"{folder}: holds no 'model.embed_tokens.weight', so it is not a Llama in this layout")
    llm = llm_from_hf(config, config_path, stored["model.embed_tokens.weight"].shape[0])
    heads = llm["num_heads"]
    key_map = hf_key_map()
    entries: dict[str, Entry] = {}
    unknown: list[str] = []
    for name, tensor in stored.items():
        if key_map.is_derived(name):
            continue
        found = key_map.to_ours(name)
        if found is None:
            unknown.append(f"{name!r} is not a name this format has")
        else:
            entries[found[0]] = Entry([tensor], reorder=rotary_reorder(found[1], heads, llm.get("num_kv_heads", heads)))
    raise_faults(f"{folder}: tensors that nothing knows", unknown)
    if _HEAD not in entries and config.get("tie_word_embeddings"):
        entries[_HEAD] = entries[EMBEDDING]
    check_llm_shapes(llm, EntrySource(entries, str(folder)), config_path)
    return Checkpoint(
        folder,
        "hf",
        entries,
        files,
        recipe=text_recipe(llm),
        tokenizer_path=find_tokenizer(folder, embedding_rows(entries), allow_more_rows=True),
        metadata={"config": config, "num_shards": len(files)},
    )
