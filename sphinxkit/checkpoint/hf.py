"""Hugging Face's layout of Llama: ``model*.safetensors`` or ``pytorch_model*.bin`` and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import Entry, bitwise_equal
from sphinxkit.checkpoint.fitting import Fitting
from sphinxkit.checkpoint.keymap import hf_key_map
from sphinxkit.checkpoint.llm_config import META_DEFAULTS, refuse_experts, text_recipe
from sphinxkit.checkpoint.reader import EMBEDDING, Checkpoint, embedding_rows
from sphinxkit.checkpoint.sharding import rotary_reorder
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.checkpoint.verification import torch_files_checks
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.files import read_json, read_tensor_files

CONFIG_NAME = "config.json"
_HEAD = "llm.lm_head.weight"
_HF_EMBEDDING = "model.embed_tokens.weight"
_MAX_POSITIONS = 2048  # transformers' default of max_position_embeddings, LlamaConfig
_MAX_SEQ_LEN = 4096  # default of our llama builder


def find_hf_files(folder: Path) -> Path | None:
    """The weight file of a folder or the index of several (safetensors before .bin); None if there is none."""
    names = ("model.safetensors", "pytorch_model.bin")
    found = [folder / f"{name}{end}" for name in names for end in (".index.json", "")]
    return next((path for path in found if path.is_file()), None)


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
    raise_errors(f"{file} cannot be followed", faults)
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
    raise_errors(f"{file} cannot be followed", faults)
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
    weights = find_hf_files(folder)
    config_path = folder / CONFIG_NAME
    if weights is None or not config_path.is_file():
        raise CheckpointError(f"{folder}: needs model.safetensors or pytorch_model.bin, and {CONFIG_NAME}")
    config = read_json(config_path)
    key_map = hf_key_map()
    stored, files = read_tensor_files(weights, key_map.is_derived)
    refuse_experts(stored, str(folder))
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
