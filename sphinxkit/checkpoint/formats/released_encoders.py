"""``encoders.json`` beside a released checkpoint: the encoders' widths, depths and activations.

The file is ours; without it every encoder is the full-size one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.registry import suggest


def options_of(entry: Any) -> dict[str, Any]:
    """A component's ``{type: name, ...}`` whichever way a recipe writes it."""
    if entry is None:
        return {}
    return {"type": entry} if isinstance(entry, str) else dict(entry)


# Defaults of the builders (sphinxkit.encoders), so that a recipe only says what differs; a test compares both.
ENCODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vit_large_patch14": {
        "activation": "quick_gelu", "image_size": 224, "patch_size": 14, "embed_dim": 1024, "num_layers": 24,
        "num_heads": 16, "mlp_ratio": 4.0, "norm_eps": 1e-5,
    },
    "convnext_xxlarge": {
        "dims": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "norm_eps": 1e-5, "activation": "gelu",
    },
    "dinov2_vit_giant_patch14": {
        "patch_size": 14, "pretrain_image_size": 518, "embed_dim": 1536, "num_layers": 40, "num_heads": 24,
        "mlp_ratio": 4.0, "hidden_dim": None, "norm_eps": 1e-6,
    },
    "blip2_qformer": {
        "image_size": 224, "patch_size": 14, "vision_dim": 1408, "vision_layers": 39, "vision_heads": 16,
        "vision_hidden_dim": 6144, "vision_norm_eps": 1e-6, "embed_dim": 768, "num_layers": 12, "num_heads": 12,
        "hidden_dim": 3072, "num_query_tokens": 32, "cross_attention_frequency": 2, "norm_eps": 1e-12,
    },
}  # fmt: skip

# Section of encoders.json -> builder, and its keys -> the builder's options.
_OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "clip": ("clip_vit_large_patch14", {
        "image_size": "image_size", "patch_size": "patch_size", "mlp_ratio": "mlp_ratio", "activation": "activation",
        "norm_eps": "norm_eps", "width": "embed_dim", "layers": "num_layers", "heads": "num_heads",
    }),
    "convnext": ("convnext_xxlarge", {
        "norm_eps": "norm_eps", "activation": "activation", "depths": "depths", "dims": "dims",
    }),
    "dinov2": ("dinov2_vit_giant_patch14", {
        "pretrain_image_size": "pretrain_image_size", "patch_size": "patch_size", "mlp_ratio": "mlp_ratio",
        "hidden": "hidden_dim", "norm_eps": "norm_eps", "embed_dim": "embed_dim", "layers": "num_layers",
        "heads": "num_heads",
    }),
    "blip2_vision": ("blip2_qformer", {
        "image_size": "image_size", "patch_size": "patch_size", "norm_eps": "vision_norm_eps",
        "hidden_size": "vision_dim", "layers": "vision_layers", "heads": "vision_heads",
        "intermediate_size": "vision_hidden_dim",
    }),
    "qformer": ("blip2_qformer", {
        "norm_eps": "norm_eps", "encoder_hidden_size": "vision_dim", "hidden_size": "embed_dim",
        "layers": "num_layers", "heads": "num_heads", "intermediate_size": "hidden_dim",
        "cross_attention_frequency": "cross_attention_frequency", "num_query_tokens": "num_query_tokens",
    }),
}  # fmt: skip

# What an encoders.json may state but the networks have only in one way.
_FIXED: dict[str, dict[str, Any]] = {
    "convnext": {"kernel_size": 7, "mlp_ratio": 4, "layer_scale": True},
    "dinov2": {"ffn": "swiglu, fused w12", "num_register_tokens": 0, "layer_scale": True},
    "blip2_vision": {"activation": "gelu", "qkv_bias": True},
    "qformer": {"activation": "gelu"},
}
_UNREAD_SECTIONS = ("note", "clip_text_leftover")  # prose, and the shapes of tensors that no model uses
_ACTIVATIONS = {
    "gelu (exact erf)": "gelu", "gelu": "gelu", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu",
    "gelu (tanh)": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}  # fmt: skip
_ACTIVATION_WORDS = {"gelu": "gelu (exact erf)", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu (tanh)"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _wrong_value(value: Any, default: Any) -> str | None:
    """What was expected instead of ``value``, whose kind the default tells; None if it will do."""
    if isinstance(default, str):
        return None  # activations, looked up before
    if isinstance(default, list):
        good = isinstance(value, list) and len(value) == len(default) and not any(_wrong_value(v, 1) for v in value)
        return None if good else f"{len(default)} positive whole numbers"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if isinstance(default, float):
        return None if is_number else "a positive number"
    if default is None and value is None:
        return None
    return None if is_number and isinstance(value, int) else "a positive whole number"


def encoder_options(config: Mapping[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Builder options from an ``encoders.json``, where they differ from the builders' defaults.

    Args:
        config: The file's content: a section for each encoder. An option that is left out is the full-size one.
        file: For messages.
    Returns:
        Builder name -> options.
    Raises:
        CheckpointError: Every unknown section or key, contradiction, or value that the encoders cannot have.
    """
    errors: list[str] = []
    stated: dict[str, dict[str, Any]] = {}
    for section, content in config.items():
        if section in _UNREAD_SECTIONS:
            continue
        if section not in _OPTIONS or not isinstance(content, Mapping):
            errors.append(f"section {section!r} is not known{suggest(section, _OPTIONS, config)}")
            continue
        builder, names = _OPTIONS[section]
        fixed = _FIXED.get(section, {})
        options = stated.setdefault(builder, {})
        for key, stated_value in content.items():
            value = stated_value
            where = f"{section}.{key}"
            if key == "note":
                continue
            if key == "activation":
                if str(value).lower() not in _ACTIVATIONS:
                    errors.append(f"{where} is {value!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}")
                    continue
                value = _ACTIVATIONS[str(value).lower()]
            if key in fixed:
                if value != fixed[key]:
                    errors.append(f"{where} is {value!r}; the encoder only exists with {fixed[key]!r}")
            elif key not in names:
                errors.append(f"{where} is not known{suggest(key, [*names, *fixed], content)}")
            elif expected := _wrong_value(value, ENCODER_DEFAULTS[builder][names[key]]):
                errors.append(f"{where} is {value!r}, expected {expected}")
            elif options.setdefault(names[key], value) != value:
                errors.append(f"{where} is {value!r}, which contradicts {options[names[key]]!r} given before")
    raise_errors(f"{file} cannot be followed", errors)
    return {builder: _only_differing(builder, options) for builder, options in stated.items()}


def _swiglu_hidden_dim(embed_dim: int, mlp_ratio: float) -> int:
    """The DINOv2 repository's rule (dinov2/layers/swiglu_ffn.py) for the width after the gate."""
    return (int(int(embed_dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def _only_differing(builder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = ENCODER_DEFAULTS[builder]
    found = {key: value for key, value in options.items() if key in defaults and _plain(value) != defaults[key]}
    if builder == "dinov2_vit_giant_patch14" and found.get("hidden_dim") is not None:
        values = {**defaults, **options}
        if found["hidden_dim"] == _swiglu_hidden_dim(values["embed_dim"], values["mlp_ratio"]):
            del found["hidden_dim"]  # None stands for that rule
    return found


def with_encoder_options(vision: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A ``vision`` part whose encoders carry ``options`` (builder name -> options)."""
    found = copy.deepcopy(dict(vision))
    for branch in found["branches"]:
        branch["encoders"] = [
            {**options_of(entry), **stated} if (stated := options.get(options_of(entry)["type"])) else entry
            for entry in branch["encoders"]
        ]
    return found


def encoders_json(vision: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``encoders.json`` of a ``vision`` part; None if every encoder is as in the full-size models.

    Args:
        vision: A recipe's ``vision`` part.
    Raises:
        CheckpointError: A DINOv2 with registers or plain feed-forward layers, which no released file has.
    """
    entries = {
        options["type"]: options for branch in vision["branches"] for options in map(options_of, branch["encoders"])
    }
    dino = entries.get("dinov2_vit_giant_patch14", {})
    if dino.get("ffn", "swiglu") != "swiglu" or dino.get("num_register_tokens"):
        raise CheckpointError("format 'sphinx' has a DINOv2 with ffn 'swiglu' and no registers only; write 'sphinxkit'")
    if not any(_only_differing(name, entry) for name, entry in entries.items() if name in ENCODER_DEFAULTS):
        return None
    content: dict[str, Any] = {}
    for section, (builder, names) in _OPTIONS.items():
        if builder not in entries:
            continue
        values = {**ENCODER_DEFAULTS[builder], **entries[builder]}
        if builder == "dinov2_vit_giant_patch14" and values["hidden_dim"] is None:
            values["hidden_dim"] = _swiglu_hidden_dim(values["embed_dim"], values["mlp_ratio"])
        written = {key: _plain(values[option]) for key, option in names.items()} | _FIXED.get(section, {})
        if "activation" in written:
            written["activation"] = _ACTIVATION_WORDS[written["activation"]]
        content[section] = written
    return content
