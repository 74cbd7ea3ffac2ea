"""Published formats of CLIP vision transformers.

Source of the names: openai/CLIP, clip/model.py; open_clip, model.py and transformer.py; transformers,
models/clip/modeling_clip.py; timm, models/vision_transformer.py.
"""

from __future__ import annotations

from typing import Any

from sphinxkit.encoders.formats.base import Configs, NameRule, WeightFormat, named
from sphinxkit.encoders.formats.configs import (
    HF_ACTIVATIONS,
    hf_config,
    mapping,
    open_clip_config,
    open_clip_heads,
    timm_config,
)

# The text tower and the joint space of open_clip's and OpenAI's models, under every name they have had.
TEXT_TOWER = (
    r"text\..+",
    r"transformer\..+",
    r"token_embedding\.weight",
    r"positional_embedding",
    r"ln_final\..+",
    r"text_projection(\..+)?",
    r"logit_(scale|bias)",
    r"attn_mask",
)


def _open_clip_options(configs: Configs) -> dict[str, Any]:
    config = open_clip_config(configs)
    if config is None:
        return {}
    stated: dict[str, Any] = {"activation": "quick_gelu" if config.get("quick_gelu") else "gelu"}
    heads = open_clip_heads(mapping(config.get("vision_cfg")))
    return stated | ({} if heads is None else {"num_heads": heads})


def _openai_options(configs: Configs) -> dict[str, Any]:
    return {"activation": "quick_gelu"}  # Source: openai/CLIP, clip/model.py, QuickGELU


def _hf_options(configs: Configs) -> dict[str, Any]:
    config = hf_config(configs, "clip", "clip_vision_model")
    if config is None:
        return {}
    vision = mapping(config.get("vision_config")) if config["model_type"] == "clip" else config
    activation = str(vision.get("hidden_act", "quick_gelu"))  # absent keys: defaults of transformers' CLIPVisionConfig
    return {
        "activation": HF_ACTIVATIONS.get(activation, activation),
        "num_heads": vision.get("num_attention_heads", 12),
        "norm_eps": vision.get("layer_norm_eps", 1e-5),
    }


def _timm_options(configs: Configs) -> dict[str, Any]:
    config = timm_config(configs)
    if config is None:
        return {}
    quick = is_natively_quick_gelu(str(config["architecture"]), str(mapping(config.get("pretrained_cfg")).get("tag")))
    stated: dict[str, Any] = {"activation": "quick_gelu" if quick else "gelu"}
    heads = mapping(config.get("model_args")).get("num_heads")
    return stated | ({} if heads is None else {"num_heads": heads})


def is_natively_quick_gelu(architecture: str, tag: str) -> bool:
    """Whether timm's weights of this name were trained with QuickGELU, as its own configurations note.

    A plain architecture takes such weights too (``vit_large_patch14_clip_224.openai``).
    """
    from timm.models import get_pretrained_cfg

    if "quickgelu" in architecture:
        return True
    try:
        config = get_pretrained_cfg(f"{architecture}.{tag}", allow_unregistered=False)
    except RuntimeError:  # a name or tag that this timm does not know
        return False
    return config is not None and any("quickgelu" in note for note in config.notes or ())


def _hf_rules(prefix: str) -> tuple[NameRule, ...]:
    layer, ours = f"{prefix}encoder.layers.{{}}.", "transformer.resblocks.{}."
    packed = [
        NameRule(tuple(f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv"), f"{ours}attn.in_proj_{kind}")
        for kind in ("weight", "bias")
    ]
    return (
        *packed,
        *named(
            (f"{prefix}embeddings.class_embedding", "class_embedding"),
            (f"{prefix}embeddings.patch_embedding.weight", "conv1.weight"),
            (f"{prefix}embeddings.position_embedding.weight", "positional_embedding"),
            (f"{prefix}pre_layrnorm.*", "ln_pre.*"),
            (f"{prefix}post_layernorm.*", "ln_post.*"),
            (f"{layer}self_attn.out_proj.*", f"{ours}attn.out_proj.*"),
            (f"{layer}layer_norm1.*", f"{ours}ln_1.*"),
            (f"{layer}layer_norm2.*", f"{ours}ln_2.*"),
            (f"{layer}mlp.fc1.*", f"{ours}mlp.c_fc.*"),
            (f"{layer}mlp.fc2.*", f"{ours}mlp.c_proj.*"),
        ),
    )


_BLOCK, _OURS = "blocks.{}.", "transformer.resblocks.{}."

CLIP_FORMATS = (
    WeightFormat(
        "OpenAI's CLIP state dict",
        marks=(r"visual\.class_embedding", "input_resolution", "context_length"),
        rules=named(("visual.*", "*")),
        skipped=(*TEXT_TOWER, r"visual\.proj", "input_resolution", "context_length", "vocab_size"),
        options=_openai_options,
    ),
    WeightFormat(
        "open_clip",
        marks=(r"visual\.class_embedding", r"visual\.transformer\.resblocks\.0\..+"),
        rules=named(("visual.*", "*")),
        skipped=(*TEXT_TOWER, r"visual\.proj"),
        options=_open_clip_options,
        usual_activation="gelu",
    ),
    WeightFormat(
        "Hugging Face CLIPModel",
        marks=(r"vision_model\.pre_layrnorm\.weight",),
        rules=_hf_rules("vision_model."),
        skipped=(
            r"text_model\..+",
            r"(visual|text)_projection\.weight",
            "logit_scale",
            r"vision_model\.embeddings\.position_ids",
        ),
        options=_hf_options,
        usual_activation="quick_gelu",  # transformers' default
    ),
    WeightFormat(
        "Hugging Face CLIPVisionModel",
        marks=(r"pre_layrnorm\.weight", r"embeddings\.class_embedding"),
        rules=_hf_rules(""),
        skipped=(r"embeddings\.position_ids", r"visual_projection\.weight"),
        options=_hf_options,
        usual_activation="quick_gelu",  # transformers' default
    ),
    WeightFormat(
        "timm CLIP",
        marks=("cls_token", "pos_embed", r"norm_pre\.weight", r"blocks\.0\.attn\.qkv\.weight"),
        rules=named(
            ("cls_token", "class_embedding"),
            ("pos_embed", "positional_embedding"),
            ("patch_embed.proj.weight", "conv1.weight"),
            ("norm_pre.*", "ln_pre.*"),
            ("norm.*", "ln_post.*"),
            (f"{_BLOCK}norm1.*", f"{_OURS}ln_1.*"),
            (f"{_BLOCK}norm2.*", f"{_OURS}ln_2.*"),
            (f"{_BLOCK}attn.qkv.weight", f"{_OURS}attn.in_proj_weight"),
            (f"{_BLOCK}attn.qkv.bias", f"{_OURS}attn.in_proj_bias"),
            (f"{_BLOCK}attn.proj.*", f"{_OURS}attn.out_proj.*"),
            (f"{_BLOCK}mlp.fc1.*", f"{_OURS}mlp.c_fc.*"),
            (f"{_BLOCK}mlp.fc2.*", f"{_OURS}mlp.c_proj.*"),
        ),
        skipped=(r"head\..+",),
        options=_timm_options,
        usual_activation="gelu",
    ),
)
"""The order matters: what OpenAI's state dict has more than open_clip's is looked for first."""
