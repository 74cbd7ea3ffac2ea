"""Hugging Face's layout of Llama: ``model*.safetensors`` or ``pytorch_model*.bin`` and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import Entry, StoredTensor, bitwise_equal, raise_faults
from sphinxkit.checkpoint.fitting import Fitting
from sphinxkit.checkpoint.keymap import hf_key_map
from sphinxkit.checkpoint.lla2acc import read_json
from sphinxkit.checkpoint.llm_config import META_DEFAULTS, refuse_experts, text_recipe
from sphinxkit.checkpoint.pickle_reader import read_pickle
from sphinxkit.checkpoint.reader import EMBEDDING, Checkpoint, embedding_rows
from sphinxkit.checkpoint.safetensors import read_safetensors
from sphinxkit.checkpoint.sharding import rotary_reorder
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.checkpoint.verification import torch_files_checks
from sphinxkit.errors import CheckpointError

CONFIG_NAME = "config.json"
_HEAD = "llm.lm_head.weight"
_HF_EMBEDDING = "model.embed_tokens.weight"
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


def read_files(files: list[Path], index: Path | None) -> dict[str, StoredTensor]:
    """The tensors of several files that do not overlap.

    Args:
        files: ``.safetensors`` or torch files.
        index: Their index, whose word on what lies where must hold.
    Raises:
        CheckpointError: Damaged files, a tensor that is in two of them, or an index that is not true.
    """
    stored: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for file in files:
        tensors = read_safetensors(file)[0] if file.suffix == ".safetensors" else read_pickle(file)
        faults += [f"{name!r} is in {stored[name].file.name} and in {file.name}" for name in tensors if name in stored]
        stored |= tensors
    if index is not None:
        indexed = indexed_files(index)
        listed = {name for names in indexed.values() for name in names}
        faults += [
            f"{name!r} is in {tensor.file.name} but not in {index.name}"
            for name, tensor in stored.items()
            if name not in listed and not hf_key_map().is_derived(name)
        ]
        for file_name, names in indexed.items():
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
    kind = str(config.get("model_type")).lower()
    if "mixtral" in kind or "moe" in kind or config.get("num_local_experts") or config.get("num_experts"):
        raise CheckpointError(
            f"{file}: model_type {config.get('model_type')!r} is a mixture-of-experts model, which is not supported yet"
        )
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
        numbers: What :func:`sphinxkit.checkpoint.llm_config.full_numbers` gives.
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


def _check_tie(entries: Mapping[str, Entry], config_path: Path) -> None:
    head, embedding = entries.get(_HEAD), entries[EMBEDDING]
    if head is not None and not bitwise_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{config_path}: tie_word_embeddings is true, but the files hold a 'lm_head.weight' that differs from "
            f"{_HF_EMBEDDING!r}; set it to false to use the files' own, or take 'lm_head.weight' out of them"
        )


def open_hf(folder: Path, defer: bool = False) -> Checkpoint:
    """Open a folder in Hugging Face's layout.

    Args:
        folder: With weight files and ``config.json``.
        defer: Whether faults of names and shapes are kept in ``Checkpoint.faults`` instead of raised.
    Raises:
        CheckpointError: Damaged or missing files, not a Llama, names or shapes that do not fit.
    """
    files, index = find_hf_files(folder)
    config_path = folder / CONFIG_NAME
    if not files or not config_path.is_file():
        raise CheckpointError(f"{folder}: needs model.safetensors or pytorch_model.bin, and {CONFIG_NAME}")
    config = read_json(config_path)
    stored = read_files(files, index)
    refuse_experts(stored, str(folder))
    key_map = hf_key_map()
    if not any(key_map.to_ours(name) for name in stored):
        raise CheckpointError(f"{folder}: holds no 'model.embed_tokens.weight', so it is not a Llama in this layout")
    fitting = Fitting(folder, key_map)
    embedding = stored.get(_HF_EMBEDDING)
    vocab_size = config.get("vocab_size") if embedding is None else embedding.shape[0]
    llm = llm_from_hf(config, config_path, vocab_size if isinstance(vocab_size, int) else 0)
    heads = llm["num_heads"]
    entries: dict[str, Entry] = {}
    unknown = fitting.faults
    for name, tensor in stored.items():
        if key_map.is_derived(name):
            continue
        found = key_map.to_ours(name)
        if found is None:
            unknown.append(f"{name!r} is not a name this format has")
        else:
            entries[found[0]] = Entry([tensor], reorder=rotary_reorder(found[1], heads, llm.get("num_kv_heads", heads)))
    if config.get("tie_word_embeddings") and EMBEDDING in entries:
        _check_tie(entries, config_path)
        entries.setdefault(_HEAD, entries[EMBEDDING])
    if EMBEDDING not in entries and not defer:
        fitting.faults.append(f"there is no {_HF_EMBEDDING!r}")
    fitting.compare(llm, entries, config_path, defer)
    return Checkpoint(
        folder,
        "hf",
        entries,
        files,
        recipe=text_recipe(llm),
        tokenizer_path=find_tokenizer(folder, embedding_rows(entries), allow_more_rows=True),
        metadata={"config": config, "num_shards": len(files)},
        checks=partial(torch_files_checks, [file for file in files if file.suffix != ".safetensors"]),
        key_map=key_map,
        faults=fitting.faults,
    )
