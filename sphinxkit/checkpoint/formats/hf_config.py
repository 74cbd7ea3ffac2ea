"""Hugging Face's ``config.json`` of Llama's line, to and from a recipe's ``llm`` part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.llm_config import LLM_DEFAULTS, differing
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.registry import suggest

SPHINX = "sphinx"
"""``model_type`` of a whole SPHINX; see ``hf_sphinx``."""


@dataclass(frozen=True)
class _Family:
    """What transformers' configuration class of a ``model_type`` decides where ``config.json`` is silent.

    Attributes:
        architecture: The class that ``architectures`` names.
        max_positions: Default of ``max_position_embeddings``.
        num_kv_heads: Default of ``num_key_value_heads``; None: as many as query heads.
        head_dim: Default of ``head_dim``; None: ``hidden_size / num_attention_heads``.
        window: Default of ``sliding_window``.
        has_window: Whether there may be one.
        has_window_switch: Whether a window counts with ``use_sliding_window`` alone.
        options: Of our model.
        norm_eps: Default of ``rms_norm_eps``.
        rope_theta: Default of ``rope_theta``.
        has_experts: Whether it is a mixture of experts.
    """

    architecture: str
    max_positions: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    has_window_switch: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    has_window: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = LLM_DEFAULTS["rope_theta"]
    has_experts: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048, has_window=False),
    "mistral": _Family("MistralForCausalLM", 131072, 8, window=4096),
    "mixtral": _Family("MixtralForCausalLM", 131072, 8, norm_eps=1e-5, rope_theta=1e6, has_experts=True),
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
_EXPERT_DEFAULTS: dict[str, Any] = {
    "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
}  # fmt: skip
"""Of Mixtral. Source: transformers 5.24, models/mixtral/configuration_mixtral.py."""
_ONLY: dict[str, Any] = {
    **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
    **{"partial_rotary_factor": 1.0, "is_encoder_decoder": False, "add_cross_attention": False},
    **{"router_jitter_noise": 0.0},
}
"""Keys with one value that the model here has."""
NO_NUMBER = frozenset(
    (
        *("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "auto_map"),
        *("use_cache", "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "is_llama_config"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
        *("return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "problem_type"),
        *("id2label", "label2id", "num_labels", "chunk_size_feed_forward", "task_specific_params", "is_decoder"),
        *("transformers.js_config", "unsloth_version", "unsloth_fixed", "max_length", "model_max_length"),
        "output_router_logits",
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
_ROPE_NUMBERS = tuple(key for key in _ROPE_NAMES if key != "truncate")
_ROPE_OF = {
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": tuple(key for key in _ROPE_NAMES if "freq" not in key),
}


_WHOLE = (
    *(*_NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window",),
)


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value, or the default where the key is missing or null."""
    return default if values.get(key) is None else values[key]


def _wrong_numbers(config: Mapping[str, Any]) -> list[str]:
    """Values that are not of their key's kind, one line each; null is what a missing key is, but of ``_NEEDED``."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

    errors = [
        f"{key!r} is {config.get(key)!r:.60}, expected a positive whole number"
        for key in _WHOLE
        if (config.get(key) is not None or key in _NEEDED)
        and not (is_number(config.get(key)) and isinstance(config[key], int))
    ]
    tables = {"": config} | {key: config[key] for key in ("rope_scaling", "rope_parameters") if _given(config, key, {})}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            errors.append(f"{name!r} is {table!r:.60}, expected an object")
            continue
        numbers = ("rms_norm_eps", "rope_theta") if table is config else ("rope_theta", *_ROPE_NUMBERS)
        errors += [
            f"{f'{name}.{key}'.lstrip('.')!r} is {table[key]!r:.60}, expected a positive number"
            for key in numbers
            if table.get(key) is not None and not is_number(table[key])
        ]
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        errors.append(f"'layer_types' is {kinds!r:.60}, expected a name for each of {layers} layers")
    if not isinstance(_given(config, "max_window_layers", 0), int):
        errors.append(f"'max_window_layers' is {config['max_window_layers']!r:.60}, expected a whole number")
    return errors


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
    family = _FAMILIES.get(kind)
    has_experts = "moe" in kind or config.get("num_local_experts") or config.get("num_experts")
    if has_experts and not (family and family.has_experts):
        raise CheckpointError(
            f"{file}: model_type {config.get('model_type')!r} is a mixture of experts; of those only 'mixtral' is known"
        )
    if family is None:
        raise CheckpointError(f"{file}: model_type is {config.get('model_type')!r}; known: {', '.join(_FAMILIES)}")
    raise_errors(f"{file} cannot be followed", _wrong_numbers(config))
    errors: list[str] = []
    known = {*_NUMBERS, *_ONLY, *NO_NUMBER, *(_EXPERT_DEFAULTS if family.has_experts else ())}
    errors += [
        f"unknown key {key!r} with the value {value!r:.60}{suggest(key, known, config)}"
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
        "norm_eps": _given(config, "rms_norm_eps", family.norm_eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "head_dim": None if head_dim is None or head_dim * heads == width else head_dim,
        "sliding_window": _window_from_hf(config, family, errors),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "moe": _moe_from_hf(config, errors) if family.has_experts else None,
        **family.options,
    }
    raise_errors(f"{file} cannot be followed", errors)
    return {**llm, **differing(options), "attention": "auto"}


def _moe_from_hf(config: Mapping[str, Any], errors: list[str]) -> dict[str, Any]:
    """``moe``. Transformers adds up the k choices of a token in its balance loss, where here their mean is taken."""
    experts, chosen, weight = (_given(config, key, default) for key, default in _EXPERT_DEFAULTS.items())
    for key, value in (("num_local_experts", experts), ("num_experts_per_tok", chosen)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            errors.append(f"{key!r} is {value!r:.60}, expected a positive whole number")
            return {}
    if chosen > experts:
        errors.append(f"'num_experts_per_tok' is {chosen}, more than 'num_local_experts' {experts}")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
        errors.append(f"'router_aux_loss_coef' is {weight!r:.60}, expected a number")
        return {}
    return {"num_experts": experts, "num_experts_per_tok": chosen, "load_balancing_weight": float(weight * chosen)}


def _rope_from_hf(config: Mapping[str, Any], family: _Family, errors: list[str]) -> tuple[float, Any, int]:
    """``rope_theta``, ``rope_scaling`` and ``max_seq_len``."""
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    theta = _given(config, "rope_theta", _given(rope, "rope_theta", family.rope_theta))
    max_positions = _given(config, "max_position_embeddings", family.max_positions)
    kind = _given(rope, "rope_type", _given(rope, "type", "default"))
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
    original = _given(config, "original_max_position_embeddings", rope.get("original_max_position_embeddings"))
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
    if not family.has_window and window is not None:
        errors.append(f"'sliding_window' is {window!r}, which model_type {config['model_type']!r} has not")
    is_on = bool(config.get("use_sliding_window", False)) if family.has_window_switch else True
    first = _given(config, "max_window_layers", 28) if family.has_window_switch else 0  # 28: transformers' default
    kinds = config.get("layer_types")
    if kinds is None:  # the later layers have the window
        kinds = ["sliding_attention"] * (is_on and first < layers) + ["full_attention"] * (not is_on or first > 0)
    if window is None or set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        errors.append("'layer_types' or 'max_window_layers': the sliding window is for some layers only; here for all")
    return int(window)


def hf_from_numbers(numbers: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A ``config.json`` for the class of transformers that computes the same: Llama, Mistral, Mixtral, Qwen2 or Qwen3.

    Args:
        numbers: What :func:`~sphinxkit.checkpoint.llm_config.full_numbers` gives.
        dtype: Of the weights: "float32".
    Raises:
        CheckpointError: No class has all of these options.
    """
    window = numbers["sliding_window"]
    if numbers["qkv_bias"] and numbers["qk_norm"]:
        raise CheckpointError("format 'hf' has no class with both qkv_bias and qk_norm; write \"sphinxkit\"")
    moe = numbers["moe"]
    if moe is not None and (numbers["qk_norm"] or numbers["qkv_bias"]):
        raise CheckpointError("format 'hf' has no class with experts and qkv_bias or qk_norm; write \"sphinxkit\"")
    if moe is not None:
        coefficient = moe["load_balancing_weight"] / moe["num_experts_per_tok"]
        values = (moe["num_experts"], moe["num_experts_per_tok"], coefficient)
        kind, beside = "mixtral", {"sliding_window": window, **dict(zip(_EXPERT_DEFAULTS, values, strict=True))}
    elif numbers["qk_norm"] or numbers["qkv_bias"]:
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
        **({} if kind in ("qwen2", "mixtral") else {"attention_bias": False}),
        **beside,
        "tie_word_embeddings": numbers["tie_embeddings"],
        "torch_dtype": dtype,
    }
