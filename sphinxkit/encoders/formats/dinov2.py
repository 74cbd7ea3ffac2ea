"""Published formats of DINOv2.

Source of the names: facebookresearch/dinov2, dinov2/models/vision_transformer.py and layers/; transformers,
models/dinov2 and models/dinov2_with_registers; timm, models/vision_transformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphinxkit.encoders.formats.base import Configs, NameRule, WeightFormat, named
from sphinxkit.encoders.formats.configs import hf_config, mapping, timm_config


def _with_class_position(parts: Sequence[Tensor]) -> Tensor:
    """Timm adds the class token's position into the token itself, so its row here is zero."""
    table = parts[0]
    return torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)


def _hf_options(configs: Configs) -> dict[str, Any]:
    config = hf_config(configs, "dinov2", "dinov2_with_registers")
    if config is None:
        return {}
    # absent keys: defaults of transformers' Dinov2Config
    return {"num_heads": config.get("num_attention_heads", 12), "norm_eps": config.get("layer_norm_eps", 1e-6)}


def _timm_options(configs: Configs) -> dict[str, Any]:
    heads = mapping((timm_config(configs) or {}).get("model_args")).get("num_heads")
    return {} if heads is None else {"num_heads": heads}


_GATED = ("mlp.gate_proj", "mlp.up_proj")


def _hf_rules(prefix: str) -> tuple[NameRule, ...]:
    layer, ours = f"{prefix}encoder.layer.{{}}.", "blocks.{}."
    query_key_value = (
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),  # as the modules of transformers 5 call them
    )
    packed = [
        NameRule(tuple(f"{layer}{part}.{kind}" for part in parts), f"{ours}{name}.{kind}")
        for parts, name in (*((parts, "attn.qkv") for parts in query_key_value), (_GATED, "mlp.fc1"))
        for kind in ("weight", "bias")
    ]
    return (
        *packed,
        *named(
            (f"{prefix}embeddings.cls_token", "cls_token"),
            (f"{prefix}embeddings.register_tokens", "reg_token"),
            (f"{prefix}embeddings.position_embeddings", "pos_embed"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
            (f"{prefix}layernorm.*", "norm.*"),
            (f"{layer}norm1.*", f"{ours}norm1.*"),
            (f"{layer}norm2.*", f"{ours}norm2.*"),
            (f"{layer}attention.output.dense.*", f"{ours}attn.proj.*"),
            (f"{layer}attention.o_proj.*", f"{ours}attn.proj.*"),
            (f"{layer}layer_scale1.lambda1", f"{ours}ls1.gamma"),
            (f"{layer}layer_scale2.lambda1", f"{ours}ls2.gamma"),
            (f"{layer}mlp.weights_in.*", f"{ours}mlp.fc1.*"),
            (f"{layer}mlp.weights_out.*", f"{ours}mlp.fc2.*"),
            (f"{layer}mlp.down_proj.*", f"{ours}mlp.fc2.*"),
            (f"{layer}mlp.fc1.*", f"{ours}mlp.fc1.*"),
            (f"{layer}mlp.fc2.*", f"{ours}mlp.fc2.*"),
        ),
    )


def _hf_format(name: str, prefix: str) -> WeightFormat:
    escaped = prefix.replace(".", r"\.")
    return WeightFormat(
        name,
        marks=(
            rf"{escaped}embeddings\.patch_embeddings\.projection\.weight",
            rf"{escaped}encoder\.layer\.0\.layer_scale1\.lambda1",
        ),
        rules=_hf_rules(prefix),
        skipped=(rf"{escaped}embeddings\.mask_token", r"classifier\..+"),
        options=_hf_options,
    )


_MARKS = ("cls_token", "pos_embed", r"patch_embed\.proj\.weight", r"blocks\.0\.ls1\.gamma")

DINOV2_FORMATS = (
    WeightFormat(
        "DINOv2's own",
        marks=(*_MARKS, r"mask_token|register_tokens|blocks\.0\.mlp\.w12\.weight"),
        rules=named(
            ("register_tokens", "reg_token"),
            ("blocks.{}.mlp.w12.*", "blocks.{}.mlp.fc1.*"),
            ("blocks.{}.mlp.w3.*", "blocks.{}.mlp.fc2.*"),
            ("*", "*"),
        ),
        skipped=("mask_token",),
    ),
    WeightFormat(
        "timm DINOv2 with registers",
        marks=(*_MARKS, "reg_token"),
        rules=(NameRule(("pos_embed",), "pos_embed", _with_class_position), *named(("*", "*"))),
        skipped=(r"head\..+",),
        options=_timm_options,
    ),
    WeightFormat("timm DINOv2", marks=_MARKS, rules=named(("*", "*")), skipped=(r"head\..+",), options=_timm_options),
    _hf_format("Hugging Face Dinov2Model", ""),
    _hf_format("Hugging Face Dinov2ForImageClassification", "dinov2."),
    _hf_format("Hugging Face Dinov2WithRegistersForImageClassification", "dinov2_with_registers."),
)
"""The order matters: timm's names without registers are the ones that are left when nothing else fits."""
