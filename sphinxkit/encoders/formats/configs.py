"""Reads network options from the JSON files beside published weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphinxkit.encoders.formats.base import Configs

# open_clip's default width of a head. Source: open_clip, model.py, CLIPVisionCfg.
_OPEN_CLIP_HEAD_WIDTH = 64

# Hugging Face's names of activations -> ours. Source: transformers, activations.py, ACT2FN.
HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def hf_config(configs: Configs, *model_types: str) -> Mapping[str, Any] | None:
    """Hugging Face's ``config.json``, if it is of one of the model types."""
    config = mapping(configs.get("config.json"))
    return config if config.get("model_type") in model_types else None


def open_clip_config(configs: Configs) -> Mapping[str, Any] | None:
    """The ``model_cfg`` of open_clip's ``open_clip_config.json``."""
    config = mapping(configs.get("open_clip_config.json")).get("model_cfg")
    return config if isinstance(config, Mapping) else None


def timm_config(configs: Configs) -> Mapping[str, Any] | None:
    """Timm's ``config.json``."""
    config = mapping(configs.get("config.json"))
    return config if isinstance(config.get("architecture"), str) else None


def open_clip_heads(vision: Mapping[str, Any]) -> int | None:
    """Heads of open_clip's ``vision_cfg``, by its rule width / head_width."""
    width, head_width = vision.get("width"), vision.get("head_width", _OPEN_CLIP_HEAD_WIDTH)
    return width // head_width if isinstance(width, int) and isinstance(head_width, int) and head_width else None
