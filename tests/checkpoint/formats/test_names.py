from __future__ import annotations

import pytest

from sphinxkit.checkpoint.formats.hf import hf_key_map
from sphinxkit.checkpoint.formats.meta import meta_key_map
from sphinxkit.checkpoint.formats.released import LLAMA_TYPES, sphinx_key_map

# released name -> canonical name (llama_ens5) and the dimension that shards split, written by hand
BY_HAND = [
    ("llma.tok_embeddings.weight", "llm.embed_tokens.weight", 1),
    ("llma.layers.7.attention.wq.weight", "llm.layers.7.attention.q_proj.weight", 0),
    ("llma.layers.7.attention.wk.weight", "llm.layers.7.attention.k_proj.weight", 0),
    ("llma.layers.17.attention.wv.weight", "llm.layers.17.attention.v_proj.weight", 0),
    ("llma.layers.0.attention.wo.weight", "llm.layers.0.attention.o_proj.weight", 1),
    ("llma.layers.0.feed_forward.w1.weight", "llm.layers.0.mlp.gate_proj.weight", 0),
    ("llma.layers.0.feed_forward.w3.weight", "llm.layers.0.mlp.up_proj.weight", 0),
    ("llma.layers.0.feed_forward.w2.weight", "llm.layers.0.mlp.down_proj.weight", 1),
    ("llma.layers.0.attention_norm.weight", "llm.layers.0.attention_norm.weight", None),
    ("llma.layers.0.ffn_norm.weight", "llm.layers.0.mlp_norm.weight", None),
    ("llma.norm.weight", "llm.norm.weight", None),
    ("llma.output.weight", "llm.lm_head.weight", 0),
    ("llma.start_img", "vision.start_token", None),
    ("llma.end_img", "vision.end_token", None),
    ("llma.qformer_proj.0.bias", "vision.branches.0.projector.proj.bias", None),
    ("llma.visual_proj.1.weight", "vision.branches.1.projector.norm.weight", None),
    ("llma.qformer.query_tokens", "vision.branches.0.encoders.0.trunk.query_tokens", None),
    ("llma.clip.visual.conv1.weight", "vision.branches.1.encoders.0.trunk.conv1.weight", None),
    ("llma.openclip_convnext_xxl.stem.0.bias", "vision.branches.1.encoders.1.trunk.stem.0.bias", None),
    ("llma.dinov2_vitg14.blocks.3.mlp.w12.bias", "vision.branches.1.encoders.2.trunk.blocks.3.mlp.fc1.bias", None),
    ("llma.dinov2_vitg14.blocks.3.mlp.w3.weight", "vision.branches.1.encoders.2.trunk.blocks.3.mlp.fc2.weight", None),
    ("llma.dinov2_vitg14.pos_embed", "vision.branches.1.encoders.2.trunk.pos_embed", None),
]

UNUSED = [
    "llma.clip.visual.proj",
    "llma.clip.positional_embedding",
    "llma.clip.text_projection",
    "llma.clip.logit_scale",
    "llma.clip.token_embedding.weight",
    "llma.clip.ln_final.bias",
    "llma.clip.transformer.resblocks.0.ln_1.weight",
    "llma.dinov2_vitg14.mask_token",
]

HF_BY_HAND = [
    ("model.embed_tokens.weight", "llm.embed_tokens.weight", None),
    ("model.layers.3.self_attn.q_proj.weight", "llm.layers.3.attention.q_proj.weight", "query"),
    ("model.layers.3.self_attn.k_proj.weight", "llm.layers.3.attention.k_proj.weight", "key"),
    ("model.layers.3.self_attn.v_proj.weight", "llm.layers.3.attention.v_proj.weight", None),
    ("model.layers.3.self_attn.o_proj.weight", "llm.layers.3.attention.o_proj.weight", None),
    ("model.layers.3.mlp.gate_proj.weight", "llm.layers.3.mlp.gate_proj.weight", None),
    ("model.layers.3.mlp.up_proj.weight", "llm.layers.3.mlp.up_proj.weight", None),
    ("model.layers.3.mlp.down_proj.weight", "llm.layers.3.mlp.down_proj.weight", None),
    ("model.layers.3.input_layernorm.weight", "llm.layers.3.attention_norm.weight", None),
    ("model.layers.3.post_attention_layernorm.weight", "llm.layers.3.mlp_norm.weight", None),
    ("model.norm.weight", "llm.norm.weight", None),
    ("lm_head.weight", "llm.lm_head.weight", None),
]


@pytest.mark.parametrize(("theirs", "ours", "dim"), BY_HAND)
def test_released_names(theirs: str, ours: str, dim: int | None) -> None:
    key_map = sphinx_key_map(LLAMA_TYPES["llama_ens5"])
    found = key_map.to_ours(theirs)
    assert found is not None
    assert (found[0], found[1].split_dim) == (ours, dim)
    back = key_map.to_theirs(ours)
    assert back is not None
    assert (back[0], back[1].split_dim) == (theirs, dim)
    assert not key_map.is_unused(theirs)


def test_light_arrangements_have_one_branch() -> None:
    key_map = sphinx_key_map(LLAMA_TYPES["llama_ens5_light"])
    for theirs, ours in [
        ("llma.visual_proj.0.weight", "vision.branches.0.projector.proj.weight"),
        ("llma.openclip_convnext_xxl.head.norm.bias", "vision.branches.0.encoders.0.trunk.head.norm.bias"),
        ("llma.dinov2_vitg14.norm.weight", "vision.branches.0.encoders.1.trunk.norm.weight"),
    ]:
        found, back = key_map.to_ours(theirs), key_map.to_theirs(ours)
        assert found is not None
        assert back is not None
        assert (found[0], back[0]) == (ours, theirs)
    assert key_map.to_ours("llma.qformer.query_tokens") is None
    assert not key_map.is_unused("llma.clip.logit_scale")


@pytest.mark.parametrize("name", UNUSED)
def test_unused_group(name: str) -> None:
    assert sphinx_key_map(LLAMA_TYPES["llama_ens"]).is_unused(name)


def test_meta_names_are_the_released_ones_without_their_prefix() -> None:
    key_map = meta_key_map()
    for theirs, ours, dim in BY_HAND[:12]:
        found, back = key_map.to_ours(theirs.removeprefix("llma.")), key_map.to_theirs(ours)
        assert found is not None
        assert back is not None
        assert (found[0], found[1].split_dim, back[0]) == (ours, dim, theirs.removeprefix("llma."))
    assert key_map.is_derived("rope.freqs")
    assert key_map.to_ours("llma.norm.weight") is None


@pytest.mark.parametrize(("theirs", "ours", "rotary"), HF_BY_HAND)
def test_hugging_face_names(theirs: str, ours: str, rotary: str | None) -> None:
    found, back = hf_key_map().to_ours(theirs), hf_key_map().to_theirs(ours)
    assert found is not None
    assert back is not None
    assert (found[0], found[1].rotary, back[0]) == (ours, rotary, theirs)


def test_derived_and_unknown_names() -> None:
    assert hf_key_map().is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert hf_key_map().is_derived("model.rotary_emb.inv_freq")
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.x.mlp.up_proj.weight", "xlm_head.weight", ""):
        assert hf_key_map().to_ours(name) is None
    text = sphinx_key_map(None)
    assert text.to_ours("llma.start_img") is None
    assert text.to_theirs("vision.start_token") is None


def test_encoders_that_the_released_files_do_not_have_get_no_name() -> None:
    vision = {"image_size": 224, "branches": [{"encoders": [{"type": "timm", "model": "vit"}, "convnext_xxlarge"]}]}
    key_map = sphinx_key_map(vision)
    assert key_map.to_theirs("vision.branches.0.encoders.0.trunk.norm.weight") is None
    found = key_map.to_theirs("vision.branches.0.encoders.1.trunk.norm.weight")
    assert found is not None
    assert found[0] == "llma.openclip_convnext_xxl.norm.weight"
