"""Hugging Face's layout of Llama's line: ``model*.safetensors`` or ``pytorch_model*.bin`` and ``config.json``.

Source of the names: transformers, models/{llama,mistral,qwen2,qwen3}/modeling_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.formats.native import is_native
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.llm_config import (
    EMBEDDING,
    HEAD,
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
from sphinxkit.registry import suggest
from sphinxkit.tensor_files.files import read_json, read_tensor_files

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_INDEX = "model.safetensors.index.json"
_HF_EMBEDDING = "model.embed_tokens.weight"
_LLAMA_EOS = 2  # transformers' default of eos_token_id, LlamaConfig; it is Llama's tokenizer's own
_NORM_EPS = 1e-6  # transformers' default of rms_norm_eps, in all families

_HF_LAYER, _OUR_LAYER = "model.layers.{}.", "llm.layers.{}."
_HF_RULES = [
    NameRule("model.embed_tokens.weight", "llm.embed_tokens.weight"),
    NameRule(f"{_HF_LAYER}self_attn.q_proj.weight", f"{_OUR_LAYER}attention.q_proj.weight", rotary="query"),
    NameRule(f"{_HF_LAYER}self_attn.k_proj.weight", f"{_OUR_LAYER}attention.k_proj.weight", rotary="key"),
    NameRule(f"{_HF_LAYER}self_attn.v_proj.weight", f"{_OUR_LAYER}attention.v_proj.weight"),
    NameRule(f"{_HF_LAYER}self_attn.o_proj.weight", f"{_OUR_LAYER}attention.o_proj.weight"),
    NameRule(f"{_HF_LAYER}self_attn.q_proj.bias", f"{_OUR_LAYER}attention.q_proj.bias", rotary="query"),
    NameRule(f"{_HF_LAYER}self_attn.k_proj.bias", f"{_OUR_LAYER}attention.k_proj.bias", rotary="key"),
    NameRule(f"{_HF_LAYER}self_attn.v_proj.bias", f"{_OUR_LAYER}attention.v_proj.bias"),
    NameRule(f"{_HF_LAYER}self_attn.q_norm.weight", f"{_OUR_LAYER}attention.q_norm.weight", rotary="head"),
    NameRule(f"{_HF_LAYER}self_attn.k_norm.weight", f"{_OUR_LAYER}attention.k_norm.weight", rotary="head"),
    NameRule(f"{_HF_LAYER}mlp.gate_proj.weight", f"{_OUR_LAYER}mlp.gate_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.up_proj.weight", f"{_OUR_LAYER}mlp.up_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.down_proj.weight", f"{_OUR_LAYER}mlp.down_proj.weight"),
    NameRule(f"{_HF_LAYER}input_layernorm.weight", f"{_OUR_LAYER}attention_norm.weight"),
    NameRule(f"{_HF_LAYER}post_attention_layernorm.weight", f"{_OUR_LAYER}mlp_norm.weight"),
    NameRule("model.norm.weight", "llm.norm.weight"),
    NameRule("lm_head.weight", "llm.lm_head.weight"),
]


def hf_key_map() -> KeyMap:
    """Names of Hugging Face's ``LlamaForCausalLM`` and its descendants."""
    return KeyMap(_HF_RULES, derived=[r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"])


def rotary_to_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows ordered in halves per head (Hugging Face) to neighbouring pairs (Meta, canonical).

    Args:
        tensor: Weights or bias of a projection, or the weights of a head's norm.
        num_heads: Heads of this projection; 1 for a norm.
    Shape:
        tensor: (num_heads * head_dim, ...)
        return: the same
    Source: transformers, models/llama/convert_llama_weights_to_hf.py, permute (the inverse).
    """
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rotary_to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`rotary_to_pairs`.

    Args:
        tensor: Weights or bias of a projection, or the weights of a head's norm.
        num_heads: Heads of this projection; 1 for a norm.
    Shape:
        tensor: (num_heads * head_dim, ...)
        return: the same
    """
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rotary(reorder: Callable[..., Tensor], rule: NameRule, num_heads: int, num_kv_heads: int) -> Convert | None:
    """``reorder`` for the tensors that a rule names; None where both sides order their rows alike."""
    if rule.rotary is None:
        return None
    return partial(reorder, num_heads={"query": num_heads, "key": num_kv_heads, "head": 1}[rule.rotary])


@dataclass(frozen=True)
class _Family:
    """What transformers' configuration class of a ``model_type`` decides where ``config.json`` is silent.

    Attributes:
        architecture: The class that ``architectures`` names.
        max_positions: Default of ``max_position_embeddings``.
        num_kv_heads: Default of ``num_key_value_heads``; None: as many as query heads.
        head_dim: Default of ``head_dim``; None: ``hidden_size / num_attention_heads``.
        window: Default of ``sliding_window``.
        has_window_switch: Whether a window counts with ``use_sliding_window`` alone.
        options: Of our model.
    """

    architecture: str
    max_positions: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    has_window_switch: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048),
    "mistral": _Family("MistralForCausalLM", 131072, 8, window=4096),
    "qwen2": _Family("Qwen2ForCausalLM", 32768, 32, None, 4096, True, {"qkv_bias": True}),
    "qwen3": _Family("Qwen3ForCausalLM", 32768, 32, 128, 4096, True, {"qk_norm": True}),
}
"""Source: transformers 5.24, models/*/configuration_*.py."""

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NUMBERS = (
    *(*_NEEDED, "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "model_type"),
)
_ONLY: dict[str, Any] = {
    **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
    **{"partial_rotary_factor": 1.0, "is_encoder_decoder": False, "add_cross_attention": False},
}
"""Keys with one value that the model here has."""
_NO_NUMBER = frozenset(
    (
        *("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "auto_map"),
        *("use_cache", "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "is_llama_config"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
        *("return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "problem_type"),
        *("id2label", "label2id", "num_labels", "chunk_size_feed_forward", "task_specific_params", "is_decoder"),
        *("transformers.js_config", "unsloth_version", "unsloth_fixed", "max_length", "model_max_length"),
    )
)
"""Keys that say nothing about a forward pass."""
_ROPE_NAMES = {
    **{"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    **{"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"},
    **{"truncate": "truncate", "original_max_position_embeddings": "original_max_seq_len"},
}
"""Theirs -> ours."""
_ROPE_KEYS = (*_ROPE_NAMES, "rope_type", "type", "rope_theta", "mscale", "mscale_all_dim", "finetuned")
_ROPE_OF = {
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": tuple(key for key in _ROPE_NAMES if "freq" not in key),
}


def llm_from_hf(config: Mapping[str, Any], file: Path, vocab_size: int) -> dict[str, Any]:
    """The recipe's ``llm`` part from a Hugging Face ``config.json`` of LLaMA's line.

    Args:
        config: The file's content.
        file: For messages.
        vocab_size: Rows of the embedding.
    Raises:
        CheckpointError: Another family, or keys and values that the model here does not have; the message names them.
    """
    kind = str(config.get("model_type")).lower()
    if "mixtral" in kind or "moe" in kind or config.get("num_local_experts") or config.get("num_experts"):
        raise CheckpointError(
            f"{file}: model_type {config.get('model_type')!r} is a mixture-of-experts model, which is not supported yet"
        )
    family = _FAMILIES.get(kind)
    if family is None:
        raise CheckpointError(f"{file}: model_type is {config.get('model_type')!r}; known: {', '.join(_FAMILIES)}")
    errors = [
        f"{key!r} is {config.get(key)!r}, expected a number" for key in _NEEDED if not isinstance(config.get(key), int)
    ]
    raise_errors(f"{file} cannot be followed", errors)
    known = {*_NUMBERS, *_ONLY, *_NO_NUMBER}
    errors += [
        f"unknown key {key!r} with the value {value!r:.60}{suggest(key, known)}"
        for key, value in config.items()
        if key not in known and value is not None
    ]
    errors += [
        f"{key!r} is {config[key]!r}; the model here only has {only!r}"
        for key, only in _ONLY.items()
        if config.get(key, only) not in (only, None)
    ]
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads", family.num_kv_heads), config.get("head_dim", family.head_dim)
    theta, scaling, max_positions = _rope_from_hf(config, family, errors)
    llm: dict[str, Any] = {
        "type": "llama",
        "vocab_size": vocab_size,
        "embed_dim": width,
        "num_layers": layers,
        "num_heads": heads,
        "hidden_dim": config["intermediate_size"],
    }
    if kv_heads not in (None, heads):
        llm["num_kv_heads"] = kv_heads
    options = {
        "max_seq_len": max_positions,
        "norm_eps": config.get("rms_norm_eps", _NORM_EPS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "head_dim": None if head_dim is None or head_dim * heads == width else head_dim,
        "sliding_window": _window_from_hf(config, family, errors),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **family.options,
    }
    raise_errors(f"{file} cannot be followed", errors)
    return {**llm, **differing(options), "attention": "auto"}


def _rope_from_hf(config: Mapping[str, Any], family: _Family, errors: list[str]) -> tuple[float, Any, int]:
    """``rope_theta``, ``rope_scaling`` and ``max_seq_len``."""
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    theta = config.get("rope_theta", rope.get("rope_theta", LLM_DEFAULTS["rope_theta"]))
    max_positions = config.get("max_position_embeddings", family.max_positions)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", *_ROPE_OF):
        errors.append(f"rotary scaling {kind!r} is not known; known: default, linear, {', '.join(_ROPE_OF)}")
        return theta, None, max_positions
    errors += [
        f"unknown key {key!r} of the rotary scaling with the value {value!r:.60}"
        for key, value in rope.items()
        if key not in _ROPE_KEYS and value is not None and (key, value) != ("partial_rotary_factor", 1.0)
    ]
    if kind == "default":
        return theta, None, max_positions
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor <= 0:
        errors.append(f"rotary scaling {kind!r}: 'factor' is {factor!r}, expected a positive number")
        return theta, None, max_positions
    if kind == "linear":
        return theta, 1.0 / float(factor), max_positions  # there positions are divided by it, here multiplied
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    if kind == "dynamic" or original is None:
        original = max_positions
    values = {**rope, "original_max_position_embeddings": int(original)}
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        scales = [0.1 * rope[key] * math.log(max(factor, 1.0)) + 1.0 for key in ("mscale", "mscale_all_dim")]
        values["attention_factor"] = scales[0] / scales[1]
    wanted = {*_ROPE_OF[kind], "original_max_position_embeddings"}
    scaling = {ours: values[key] for key, ours in _ROPE_NAMES.items() if key in wanted and values.get(key) is not None}
    if kind != "llama3":  # these files give the pretrained length
        max_positions = max(max_positions, int(original * factor))
    return theta, {"type": kind, **scaling}, max_positions


def _window_from_hf(config: Mapping[str, Any], family: _Family, errors: list[str]) -> int | None:
    """``sliding_window``: of all layers or of none."""
    window = config.get("sliding_window", family.window)
    layers = config["num_hidden_layers"]
    if family.window is None and window is not None:
        errors.append(f"'sliding_window' is {window!r}, which model_type {config['model_type']!r} has not")
    is_on = config.get("use_sliding_window", False) if family.has_window_switch else True
    first = config.get("max_window_layers", 28) if family.has_window_switch else 0  # 28: transformers' default
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if is_on and i >= first else "full_attention" for i in range(layers)]
    if window is None or set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        errors.append("'layer_types' or 'max_window_layers': the sliding window is for some layers only; here for all")
    return int(window)


def hf_from_numbers(numbers: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A ``config.json`` for the class of transformers that computes the same: Llama, Mistral, Qwen2 or Qwen3.

    Args:
        numbers: What :func:`~sphinxkit.checkpoint.llm_config.full_numbers` gives.
        dtype: Of the weights: "float32".
    Raises:
        CheckpointError: No class has all of these options.
    """
    window = numbers["sliding_window"]
    if numbers["qkv_bias"] and numbers["qk_norm"]:
        raise CheckpointError("format 'hf' has no class with both qkv_bias and qk_norm; write \"sphinxkit\"")
    if numbers["qk_norm"] or numbers["qkv_bias"]:
        kind = "qwen3" if numbers["qk_norm"] else "qwen2"
        beside = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    elif window is not None:
        kind, beside = "mistral", {"sliding_window": window}
    else:
        kind, beside = "llama", {"mlp_bias": False}
    scaling, max_positions = numbers["rope_scaling"], numbers["max_seq_len"]
    if isinstance(scaling, Mapping):
        fields = {theirs: scaling[ours] for theirs, ours in _ROPE_NAMES.items() if ours in scaling}
        rope: dict[str, Any] | None = {"rope_type": scaling["type"], **fields}
        if scaling["type"] == "dynamic":
            max_positions = scaling["original_max_seq_len"]
    else:
        rope = None if scaling is None else {"rope_type": "linear", "factor": 1.0 / scaling}
    return {
        "architectures": [_FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_size": numbers["embed_dim"],
        "intermediate_size": numbers["hidden_dim"],
        "num_hidden_layers": numbers["num_layers"],
        "num_attention_heads": numbers["num_heads"],
        "num_key_value_heads": numbers["num_kv_heads"],
        "head_dim": numbers["head_dim"] or numbers["embed_dim"] // numbers["num_heads"],
        "vocab_size": numbers["vocab_size"],
        "max_position_embeddings": max_positions,
        "rms_norm_eps": numbers["norm_eps"],
        "rope_theta": numbers["rope_theta"],
        "rope_scaling": rope,
        "hidden_act": "silu",
        **({} if kind == "qwen2" else {"attention_bias": False}),
        **beside,
        "tie_word_embeddings": numbers["tie_embeddings"],
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


@dataclass(frozen=True)
class LanguageModelFolder:
    """What a folder says about its language model, whether its weights are there or not.

    Attributes:
        llm: The recipe's ``llm`` part.
        end_ids: Ids that end an answer, beside the tokenizer's end-of-sentence.
        tokenizer: The file of its tokenizer, if there is one.
    """

    llm: dict[str, Any]
    end_ids: tuple[int, ...]
    tokenizer: Path | None


def read_language_model(folder: Path) -> LanguageModelFolder:
    """Read ``config.json`` and what lies beside it; no weights.

    Args:
        folder: With ``config.json``.
    Raises:
        CheckpointError: Damaged files, numbers that cannot be followed, or a tokenizer that does not fit.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise CheckpointError(f"{path}: 'vocab_size' is {vocab_size!r}, expected a number")
    llm = llm_from_hf(config, path, vocab_size)
    ends = tuple(_end_ids(folder, config, vocab_size))
    return LanguageModelFolder(llm, ends, HuggingFace().tokenizer(folder, vocab_size))


def _check_tie(tensors: Mapping[str, MergedTensor], config_path: Path) -> None:
    head, embedding = tensors.get(HEAD), tensors[EMBEDDING]
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
    """Hugging Face's layout of ``LlamaForCausalLM`` and its descendants."""

    name = "hf"
    looks_like = "model.safetensors / pytorch_model.bin with config.json"
    is_text_only = True
    has_options = True
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
            merged.pop(HEAD, None)
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
