"""Published formats of BLIP-2's vision tower and Q-Former.

Source of the names: transformers, models/blip_2/modeling_blip_2.py; salesforce/LAVIS, lavis/models/eva_vit.py and
blip2_models/ (blip2.py, Qformer.py, blip2_qformer.py, blip2_opt.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphinxkit.encoders.formats.base import Configs, NameRule, WeightFormat, named
from sphinxkit.encoders.formats.configs import HF_ACTIVATIONS, hf_config, mapping


def _with_zero_key_bias(parts: Sequence[Tensor]) -> Tensor:
    """EVA's attention has biases of queries and values alone; the packed bias has zeros for the keys."""
    query, value = parts
    return torch.cat([query, torch.zeros_like(query), value])


def _hf_options(configs: Configs) -> dict[str, Any]:
    config = hf_config(configs, "blip-2")
    if config is None:
        return {}
    vision, qformer = mapping(config.get("vision_config")), mapping(config.get("qformer_config"))
    activation = str(vision.get("hidden_act", "gelu"))
    # absent keys: defaults of transformers' Blip2VisionConfig and Blip2QFormerConfig
    return {
        "activation": HF_ACTIVATIONS.get(activation, activation),
        "vision_heads": vision.get("num_attention_heads", 16),
        "vision_norm_eps": vision.get("layer_norm_eps", 1e-6),
        "num_heads": qformer.get("num_attention_heads", 12),
        "norm_eps": qformer.get("layer_norm_eps", 1e-12),
    }


def _eva_rules(prefix: str) -> tuple[NameRule, ...]:
    """EVA's ViT under LAVIS's name for it, or bare as its own file has it."""
    block, ours = f"{prefix}blocks.{{}}.", "vision_model.encoder.layers.{}."
    biases = (f"{block}attn.q_bias", f"{block}attn.v_bias")
    return (
        NameRule(biases, f"{ours}self_attn.qkv.bias", _with_zero_key_bias),
        *named(
            (f"{prefix}cls_token", "vision_model.embeddings.class_embedding"),
            (f"{prefix}pos_embed", "vision_model.embeddings.position_embedding"),
            (f"{prefix}patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
            (f"{block}norm1.*", f"{ours}layer_norm1.*"),
            (f"{block}norm2.*", f"{ours}layer_norm2.*"),
            (f"{block}attn.qkv.weight", f"{ours}self_attn.qkv.weight"),
            (f"{block}attn.proj.*", f"{ours}self_attn.projection.*"),
            (f"{block}mlp.*", f"{ours}mlp.*"),
        ),
    )


def _qformer_rules() -> tuple[NameRule, ...]:
    layer, ours = "Qformer.bert.encoder.layer.{}.", "qformer.encoder.layer.{}."
    return named(
        ("Qformer.bert.embeddings.LayerNorm.*", "qformer.layernorm.*"),
        (f"{layer}attention.self.*", f"{ours}attention.attention.*"),
        (f"{layer}attention.output.*", f"{ours}attention.output.*"),
        (f"{layer}crossattention.self.*", f"{ours}crossattention.attention.*"),
        (f"{layer}crossattention.output.*", f"{ours}crossattention.output.*"),
        (f"{layer}intermediate_query.*", f"{ours}intermediate_query.*"),
        (f"{layer}output_query.*", f"{ours}output_query.*"),
    )


BLIP2_FORMATS = (
    WeightFormat(
        "Hugging Face Blip2Model",
        marks=("query_tokens", r"vision_model\.embeddings\.class_embedding", r"qformer\.layernorm\.weight"),
        rules=named(("query_tokens", "query_tokens"), ("vision_model.*", "vision_model.*"), ("qformer.*", "qformer.*")),
        skipped=(
            r"language_(model|projection)\..+",
            # the text side of Blip2ForImageTextRetrieval
            r"embeddings\..+",
            r"(vision|text)_projection\..+",
            r"itm_head\..+",
            r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..+",
        ),
        options=_hf_options,
    ),
    WeightFormat(
        "LAVIS BLIP-2",
        marks=("query_tokens", r"Qformer\.bert\.embeddings\.LayerNorm\.weight"),
        rules=(
            *named(("query_tokens", "query_tokens"), ("ln_vision.*", "vision_model.post_layernorm.*")),
            *_qformer_rules(),
            *_eva_rules("visual_encoder."),
            *_eva_rules(""),
        ),
        skipped=(
            r"(opt|t5|llm)_(model|proj)\..+",
            # the text side of the first stage
            r"Qformer\.cls\..+",
            r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings)\.weight",
            r"Qformer\.bert\.embeddings\.position_ids",
            r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+",
            r"(vision|text)_proj\..+",
            r"itm_head\..+",
            "temp",
            # of EVA's own file: BLIP-2 reads the tower without its last block (the 40th) and without what follows
            r"(visual_encoder\.)?blocks\.39\..+",
            r"(fc_)?norm\..+",
            r"(lm_)?head\..+",
            "mask_token",
        ),
        note="LAVIS publishes the frozen tower apart (eva_vit_g.pth): lay both files in one folder and give the folder",
        joins_files=True,
    ),
)
