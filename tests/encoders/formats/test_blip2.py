"""BLIP-2's published formats, read into the Q-Former encoder.

Hugging Face's come from its own modules and writer. LAVIS is no dependency: its files are made from Hugging Face's
weights by LAVIS's names, and its attention (biases of queries and values alone) is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from sphinxkit import encoders
from sphinxkit.encoders import Encoder
from sphinxkit.errors import CheckpointError

# Tokens of order one to five through at most five float32 layers in another order of sums.
TOKENS_ATOL = 1e-5

SIZES: list[dict[str, Any]] = [
    {
        "image_size": 28, "vision_dim": 16, "vision_layers": 1, "vision_heads": 2, "vision_hidden_dim": 24,
        "embed_dim": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 12, "num_query_tokens": 3,
    },
    {
        "image_size": 42, "vision_dim": 32, "vision_layers": 2, "vision_heads": 4, "vision_hidden_dim": 40,
        "embed_dim": 24, "num_layers": 3, "num_heads": 4, "hidden_dim": 20, "num_query_tokens": 5,
    },
]  # fmt: skip


def hugging_face(kind: type[Any], options: dict[str, Any], randomize: Callable[..., nn.Module]) -> Any:
    vision = Blip2VisionConfig(
        hidden_size=options["vision_dim"],
        intermediate_size=options["vision_hidden_dim"],
        num_hidden_layers=options["vision_layers"],
        num_attention_heads=options["vision_heads"],
        image_size=options["image_size"],
        patch_size=14,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=options["embed_dim"],
        intermediate_size=options["hidden_dim"],
        num_hidden_layers=options["num_layers"],
        num_attention_heads=options["num_heads"],
        encoder_hidden_size=options["vision_dim"],
        vocab_size=30,
    )
    text = OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=60, word_embed_proj_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=options["num_query_tokens"],
    )
    return randomize(kind(config)).eval()


def query_tokens(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        image = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        out: Tensor = model.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    return out


def ours(source: Path, options: dict[str, Any], **more: Any) -> Encoder:
    return encoders.create("blip2_qformer", weights=source, **{**options, **more})


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("kind", [Blip2Model, Blip2ForConditionalGeneration])
def test_hugging_face(
    options: dict[str, Any],
    kind: type[Any],
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    model = hugging_face(kind, options, randomize)
    model.save_pretrained(tmp_path)
    encoder = ours(tmp_path, options)
    pixels = random_pixels(2, options["image_size"])
    torch.testing.assert_close(encoder(pixels).prefix, query_tokens(model, pixels), rtol=0, atol=TOKENS_ATOL)
    report = encoders.load_weights(encoder, tmp_path)
    assert report.format == "Hugging Face Blip2Model"
    assert all(name.startswith(("language_model.", "language_projection.")) for name in report.skipped)


@pytest.mark.parametrize("options", SIZES)
def test_only_shards_with_needed_tensors_are_opened(
    options: dict[str, Any], tmp_path: Path, randomize: Callable[..., nn.Module], random_pixels: Callable[..., Tensor]
) -> None:
    model = hugging_face(Blip2Model, options, randomize)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    removed = []
    for shard in sorted(tmp_path.glob("model-*.safetensors")):
        held = re.findall(rf'"([\w.]+)": "{re.escape(shard.name)}"', index)
        if all(name.startswith("language_model.") for name in held):
            shard.unlink()
            removed.append(shard)
    assert removed
    encoder = ours(tmp_path, options)
    pixels = random_pixels(2, options["image_size"])
    torch.testing.assert_close(encoder(pixels).prefix, query_tokens(model, pixels), rtol=0, atol=TOKENS_ATOL)


def lavis_names(state: dict[str, Tensor], first_stage: bool) -> dict[str, Tensor]:
    """Hugging Face's tensors under LAVIS's names, with the tensors beside them that LAVIS saves."""
    renames = [
        (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
        (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
        (r"vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
        (r"vision_model\.post_layernorm\.", "ln_vision."),
        (r"vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
        (r"layer_norm([12])\.", r"norm\1."),
        (r"self_attn\.projection\.", "attn.proj."),
        (r"self_attn\.qkv\.", "attn.qkv."),
        (r"qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
        (r"qformer\.encoder\.", "Qformer.bert.encoder."),
        (r"attention\.attention\.", "attention.self."),
        (r"language_projection\.", "opt_proj."),
        (r"language_model\.", "opt_model."),
    ]
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            found[name.replace("qkv.bias", "q_bias")] = query.clone()
            found[name.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            found[name] = tensor
    if first_stage:
        width = state["query_tokens"].shape[-1]
        found = {name: tensor for name, tensor in found.items() if not name.startswith("opt_")}
        found |= {
            "Qformer.bert.embeddings.word_embeddings.weight": torch.randn(30, width),
            "Qformer.bert.embeddings.position_embeddings.weight": torch.randn(10, width),
            "Qformer.bert.embeddings.position_ids": torch.arange(10)[None],
            "Qformer.cls.predictions.bias": torch.randn(30),
            "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.randn(5, width),
            "Qformer.bert.encoder.layer.0.output.dense.weight": torch.randn(width, 5),
            "vision_proj.weight": torch.randn(4, width),
            "text_proj.weight": torch.randn(4, width),
            "itm_head.weight": torch.randn(2, width),
            "temp": torch.tensor(0.07),
        }
    return found


@pytest.fixture
def without_key_bias() -> Callable[[Any], Any]:
    """EVA has no bias of the keys, which Hugging Face's conversion stores as zeros."""

    def clear(model: Any) -> Any:
        with torch.no_grad():
            for layer in model.vision_model.encoder.layers:
                layer.self_attn.qkv.bias.chunk(3)[1].zero_()
        return model

    return clear


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("first_stage", [False, True])
def test_lavis(
    options: dict[str, Any],
    first_stage: bool,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
    without_key_bias: Callable[[Any], Any],
) -> None:
    model = without_key_bias(hugging_face(Blip2Model, options, randomize))
    path = tmp_path / "blip2.pth"
    torch.save({"model": lavis_names(model.state_dict(), first_stage)}, path)
    encoder = ours(path, options)
    pixels = random_pixels(2, options["image_size"])
    torch.testing.assert_close(encoder(pixels).prefix, query_tokens(model, pixels), rtol=0, atol=TOKENS_ATOL)
    assert encoders.load_weights(encoder, path).format == "LAVIS BLIP-2"


def test_lavis_in_two_files(
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
    without_key_bias: Callable[[Any], Any],
) -> None:
    """As LAVIS publishes it: the trained Q-Former, and EVA's frozen tower with the block that BLIP-2 leaves out."""
    options = SIZES[1]
    model = without_key_bias(hugging_face(Blip2Model, options, randomize))
    state = lavis_names(model.state_dict(), False)
    tower = {name.removeprefix("visual_encoder."): t for name, t in state.items() if name.startswith("visual_encoder.")}
    last = {name.replace("blocks.1.", "blocks.39."): t for name, t in tower.items() if name.startswith("blocks.1.")}
    more = {"norm.weight": torch.randn(32), "head.weight": torch.randn(3, 32), "mask_token": torch.randn(1, 1, 32)}
    torch.save({name: t.half() for name, t in {**tower, **last, **more}.items()}, tmp_path / "eva_vit_g.pth")
    rest = {name: t for name, t in state.items() if not name.startswith("visual_encoder.")}
    torch.save({"model": rest}, tmp_path / "blip2_pretrained_opt2.7b.pth")
    with torch.no_grad():
        for parameter in model.vision_model.encoder.parameters():
            parameter.copy_(parameter.half())
        for parameter in model.vision_model.embeddings.parameters():
            parameter.copy_(parameter.half())
    encoder = ours(tmp_path, options)
    pixels = random_pixels(2, options["image_size"])
    torch.testing.assert_close(encoder(pixels).prefix, query_tokens(model, pixels), rtol=0, atol=TOKENS_ATOL)
    with pytest.raises(CheckpointError, match=r"'trunk.vision_model\..*' is missing in the files") as caught:
        ours(tmp_path / "blip2_pretrained_opt2.7b.pth", options)
    assert "LAVIS publishes the frozen tower apart (eva_vit_g.pth)" in str(caught.value)


def test_positions_of_another_size(tmp_path: Path, randomize: Callable[..., nn.Module]) -> None:
    options = SIZES[0]
    model = hugging_face(Blip2Model, options, randomize)
    model.save_pretrained(tmp_path)
    encoder = ours(tmp_path, options, image_size=56)
    table = model.vision_model.embeddings.position_embedding.detach()
    grid = table[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    found = encoder.state_dict()["trunk.vision_model.embeddings.position_embedding"]
    assert torch.equal(found[:, :1], table[:, :1])
    assert torch.equal(found[:, 1:], expected.flatten(2).transpose(1, 2))


def test_heads_come_from_the_configuration(tmp_path: Path, randomize: Callable[..., nn.Module]) -> None:
    hugging_face(Blip2Model, SIZES[0], randomize).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        ours(tmp_path, SIZES[0], vision_heads=4, norm_eps=1e-6)
    assert "vision_heads is 2 in the files' configuration, 4 in the encoder" in str(caught.value)
    assert "norm_eps is 1e-12 in the files' configuration, 1e-06 in the encoder" in str(caught.value)
