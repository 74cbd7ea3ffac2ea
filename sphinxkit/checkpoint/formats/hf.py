"""Hugging Face's layout of Llama: ``model*.safetensors`` or ``pytorch_model*.bin`` and ``config.json``.

Source of the names: transformers, models/llama/modeling_llama.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.formats.native import is_native
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.llm_config import (
    EMBEDDING,
    LLM_DEFAULTS,
    Fitting,
    differing,
    embedding_rows,
    model_recipe,
    refuse_experts,
)
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import MergedTensor, bitwise_equal
from sphinxkit.checkpoint.verify import torch_files_checks
from sphinxkit.checkpoint.writing import (
    Convert,
    TensorInput,
    Texts,
    WriteOptions,
    json_text,
    pieces_of,
    write_safetensors_shards,
)
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.files import read_json, read_tensor_files

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_INDEX = "model.safetensors.index.json"
_HEAD = "llm.lm_head.weight"
_HF_EMBEDDING = "model.embed_tokens.weight"
_MAX_POSITIONS = 2048  # transformers' default of max_position_embeddings, LlamaConfig
_LLAMA_EOS = 2  # transformers' default of eos_token_id, LlamaConfig; it is Llama's tokenizer's own
_NORM_EPS = 1e-6  # transformers' default of rms_norm_eps, LlamaConfig

_HF_LAYER, _OUR_LAYER = "model.layers.{}.", "llm.layers.{}."
_HF_RULES = [
    NameRule("model.embed_tokens.weight", "llm.embed_tokens.weight"),
    NameRule(f"{_HF_LAYER}self_attn.q_proj.weight", f"{_OUR_LAYER}attention.q_proj.weight", rotary="query"),
    NameRule(f"{_HF_LAYER}self_attn.k_proj.weight", f"{_OUR_LAYER}attention.k_proj.weight", rotary="key"),
    NameRule(f"{_HF_LAYER}self_attn.v_proj.weight", f"{_OUR_LAYER}attention.v_proj.weight"),
    NameRule(f"{_HF_LAYER}self_attn.o_proj.weight", f"{_OUR_LAYER}attention.o_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.gate_proj.weight", f"{_OUR_LAYER}mlp.gate_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.up_proj.weight", f"{_OUR_LAYER}mlp.up_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.down_proj.weight", f"{_OUR_LAYER}mlp.down_proj.weight"),
    NameRule(f"{_HF_LAYER}input_layernorm.weight", f"{_OUR_LAYER}attention_norm.weight"),
    NameRule(f"{_HF_LAYER}post_attention_layernorm.weight", f"{_OUR_LAYER}mlp_norm.weight"),
    NameRule("model.norm.weight", "llm.norm.weight"),
    NameRule("lm_head.weight", "llm.lm_head.weight"),
]


def hf_key_map() -> KeyMap:
    """Names of Hugging Face's ``LlamaForCausalLM``."""
    return KeyMap(_HF_RULES, derived=[r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"])


def rotary_to_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows ordered in halves per head (Hugging Face) to neighbouring pairs (Meta, canonical).

    Args:
        tensor: Weights of a projection.
        num_heads: Heads of this projection.
    Shape:
        tensor: (num_heads * head_dim, D)
        return: the same
    Source: transformers, models/llama/convert_llama_weights_to_hf.py, permute (the inverse).
    """
    rows, width = tensor.shape
    return tensor.reshape(num_heads, 2, rows // num_heads // 2, width).transpose(1, 2).reshape(rows, width)


def rotary_to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`rotary_to_pairs`.

    Args:
        tensor: Weights of a projection.
        num_heads: Heads of this projection.
    Shape:
        tensor: (num_heads * head_dim, D)
        return: the same
    """
    rows, width = tensor.shape
    return tensor.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _rotary(reorder: Callable[..., Tensor], rule: NameRule, num_heads: int, num_kv_heads: int) -> Convert | None:
    """``reorder`` for the tensors that a rule names; None where both sides order their rows alike."""
    if rule.rotary is None:
        return None
    return partial(reorder, num_heads=num_heads if rule.rotary == "query" else num_kv_heads)


def llm_from_hf(config: Mapping[str, Any], file: Path, vocab_size: int) -> dict[str, Any]:
    """The recipe's ``llm`` part from a Hugging Face ``config.json``.

    Args:
        config: The file's content.
        file: For messages.
        vocab_size: Rows of the embedding.
    Raises:
        CheckpointError: Not a Llama, or a Llama with parts that this one does not have.
    """
    errors: list[str] = []
    kind = str(config.get("model_type")).lower()
    if "mixtral" in kind or "moe" in kind or config.get("num_local_experts") or config.get("num_experts"):
        raise CheckpointError(
            f"{file}: model_type {config.get('model_type')!r} is a mixture-of-experts model, which is not supported yet"
        )
    if config.get("model_type") != "llama":
        raise CheckpointError(f"{file}: model_type is {config.get('model_type')!r}; only 'llama' can be read")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    errors += [
        f"{key!r} is {config.get(key)!r}, expected a number" for key in needed if not isinstance(config.get(key), int)
    ]
    raise_errors(f"{file} cannot be followed", errors)
    heads = config["num_attention_heads"]
    for key, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, only) != only:
            errors.append(f"{key!r} is {config[key]!r}; the model here only has {only!r}")
    if config.get("head_dim") not in (None, config["hidden_size"] // heads):
        errors.append(f"'head_dim' is {config['head_dim']!r}; here it is hidden_size / num_attention_heads")
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        errors.append(f"rotary scaling {kind!r} is not supported yet (only 'linear')")
    raise_errors(f"{file} cannot be followed", errors)
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
    options = {
        "max_seq_len": config.get("max_position_embeddings", _MAX_POSITIONS),
        "norm_eps": config.get("rms_norm_eps", _NORM_EPS),
        "rope_theta": config.get("rope_theta", rope.get("rope_theta", LLM_DEFAULTS["rope_theta"])),
        # there positions are divided by it, here multiplied
        "rope_scaling": 1.0 / float(rope["factor"]) if kind == "linear" else None,
    }
    return {**llm, **differing(options), "attention": "auto"}


def hf_from_numbers(numbers: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A ``config.json`` for transformers' ``LlamaForCausalLM``.

    Args:
        numbers: What :func:`~sphinxkit.checkpoint.llm_config.full_numbers` gives.
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
        "max_position_embeddings": numbers["max_seq_len"],
        "rms_norm_eps": numbers["norm_eps"],
        "rope_theta": numbers["rope_theta"],
        "rope_scaling": None if scaling is None else {"rope_type": "linear", "factor": 1.0 / scaling},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _end_ids(folder: Path, config: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Ids of ``eos_token_id`` (one or a list), where they are others than Llama's own."""
    files = [config]
    if (folder / GENERATION_CONFIG_NAME).is_file():
        files.append(read_json(folder / GENERATION_CONFIG_NAME))
    found: list[int] = []
    for content in files:
        value = content.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and 0 <= token < vocab_size and token not in found:
                found.append(token)
    return [] if found == [_LLAMA_EOS] else found


def _check_tie(tensors: Mapping[str, MergedTensor], config_path: Path) -> None:
    head, embedding = tensors.get(_HEAD), tensors[EMBEDDING]
    if head is not None and not bitwise_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{config_path}: tie_word_embeddings is true, but the files hold a 'lm_head.weight' that differs from "
            f"{_HF_EMBEDDING!r}; set it to false to use the files' own, or take 'lm_head.weight' out of them"
        )


def _find_weights(folder: Path) -> Path | None:
    """The weight file of a folder or the index of several (safetensors before .bin); None if there is none."""
    names = ("model.safetensors", "pytorch_model.bin")
    found = [folder / f"{name}{end}" for name in names for end in (".index.json", "")]
    return next((path for path in found if path.is_file()), None)


@register("hf")
class HuggingFace(Format):
    """Hugging Face's layout of ``LlamaForCausalLM``."""

    name = "hf"
    looks_like = "model.safetensors / pytorch_model.bin with config.json"
    is_text_only = True
    may_pad_vocabulary = True

    def detect(self, folder: Path) -> bool:
        """Whether weights and ``config.json`` lie there, and no index of sphinxkit's own."""
        names = {path.name for path in folder.iterdir()}
        weights = any(n.startswith("model") and n.endswith((".safetensors", ".safetensors.index.json")) for n in names)
        weights |= any(n.startswith("pytorch_model") and n.endswith((".bin", ".bin.index.json")) for n in names)
        return weights and CONFIG_NAME in names and not is_native(folder)

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder with weight files and ``config.json``.

        Raises:
            CheckpointError: Damaged or missing files, not a Llama, names or shapes that do not fit.
        """
        weights = _find_weights(folder)
        config_path = folder / CONFIG_NAME
        if weights is None or not config_path.is_file():
            raise CheckpointError(f"{folder}: needs model.safetensors or pytorch_model.bin, and {CONFIG_NAME}")
        config = read_json(config_path)
        key_map = hf_key_map()
        stored, files = read_tensor_files(weights, key_map.is_derived)
        refuse_experts(stored, str(folder))
        if not any(key_map.to_ours(name) for name in stored):
            raise CheckpointError(
                f"{folder}: holds no 'model.embed_tokens.weight', so it is not a Llama in this layout"
            )
        fitting = Fitting(folder, key_map, options.defer_errors)
        embedding = stored.get(_HF_EMBEDDING)
        vocab_size = config.get("vocab_size") if embedding is None else embedding.shape[0]
        llm = llm_from_hf(config, config_path, vocab_size if isinstance(vocab_size, int) else 0)
        heads = llm["num_heads"]
        kv_heads = llm.get("num_kv_heads", heads)
        merged: dict[str, MergedTensor] = {}
        for name, tensor in stored.items():
            if key_map.is_derived(name):
                continue
            found = key_map.to_ours(name)
            if found is None:
                fitting.errors.append(f"{name!r} is not a name this format has")
            else:
                merged[found[0]] = MergedTensor([tensor], reorder=_rotary(rotary_to_pairs, found[1], heads, kv_heads))
        if config.get("tie_word_embeddings") and EMBEDDING in merged:
            _check_tie(merged, config_path)
            merged.setdefault(_HEAD, merged[EMBEDDING])
        if EMBEDDING not in merged and not fitting.defer:
            fitting.errors.append(f"there is no {_HF_EMBEDDING!r}")
        fitting.compare(llm, merged, config_path)
        return Checkpoint(
            folder,
            self.name,
            merged,
            files,
            recipe=model_recipe(llm, end_ids=_end_ids(folder, config, llm["vocab_size"])),
            tokenizer_path=self.tokenizer(folder, embedding_rows(merged)),
            metadata={"config": config, "num_shards": len(files)},
            checks=partial(torch_files_checks, [file for file in files if file.suffix != ".safetensors"]),
            key_map=key_map,
            errors=fitting.errors,
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write ``model*.safetensors`` and ``config.json``."""
        numbers = self.numbers(source, options.recipe)
        convert = partial(
            _rotary, rotary_to_halves, num_heads=numbers["num_heads"], num_kv_heads=numbers["num_kv_heads"]
        )
        pieces = pieces_of(source, hf_key_map(), conversion=convert)
        weight_map, written = write_safetensors_shards(folder, source, pieces, options.max_shard_bytes, checksum=False)
        config = hf_from_numbers(numbers, str(source.dtype(EMBEDDING)).removeprefix("torch."))
        if options.recipe is not None and options.recipe.get("end_ids"):
            config["eos_token_id"] = options.recipe["end_ids"]
        texts = {CONFIG_NAME: json_text(config)}
        if len(written) > 1:
            total = sum(piece.spec.num_bytes for piece in pieces)
            texts[_INDEX] = json_text({"metadata": {"total_size": total}, "weight_map": weight_map})
        return texts
