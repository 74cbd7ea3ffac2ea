"""Encoders at full size: ours against open_clip, timm and transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Context, Work, build_random, count_flops, nbytes
from sphinxkit import encoders

# Tens of layers in another order of summation; bf16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
MICRO: dict[str, dict[str, Any]] = {
    "clip_vit_large_patch14": {"image_size": 28, "embed_dim": 16, "num_layers": 2, "num_heads": 2},
    "convnext_xxlarge": {"input_size": 32, "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "dinov2_vit_giant_patch14": {
        "input_size": 28,
        "pretrain_image_size": 42,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
    },
    "blip2_qformer": {
        "image_size": 28,
        "vision_dim": 16,
        "vision_layers": 2,
        "vision_heads": 2,
        "vision_hidden_dim": 32,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 32,
        "num_query_tokens": 4,
    },
}


def _open_clip(encoder: Any) -> Callable[[Tensor], Tensor]:
    """open_clip's modules, called one by one as the public code does."""
    from open_clip.transformer import VisionTransformer

    ours = encoder.trunk
    blocks = ours.transformer.resblocks
    with torch.device("meta"):
        trunk = VisionTransformer(
            image_size=encoder.input_size,
            patch_size=ours.conv1.kernel_size[0],
            width=encoder.embed_dim,
            layers=len(blocks),
            heads=blocks[0].attn.num_heads,
            mlp_ratio=blocks[0].mlp.c_fc.out_features / encoder.embed_dim,
            act_layer=type(blocks[0].mlp.gelu),
            norm_layer=nn.LayerNorm,
        )
    trunk.proj = None
    trunk.load_state_dict(ours.state_dict(), assign=True)
    trunk.eval()

    def call(pixels: Tensor) -> Tensor:
        hidden = trunk.conv1(pixels.to(encoder.dtype))
        hidden = hidden.flatten(2).permute(0, 2, 1)
        token = trunk.class_embedding + hidden.new_zeros(hidden.shape[0], 1, hidden.shape[-1])
        hidden = trunk.ln_pre(torch.cat([token, hidden], dim=1) + trunk.positional_embedding)
        if not getattr(trunk.transformer, "batch_first", False):
            return trunk.ln_post(trunk.transformer(hidden.permute(1, 0, 2)).permute(1, 0, 2))
        return trunk.ln_post(trunk.transformer(hidden))

    return call


def _timm_convnext(encoder: Any) -> Callable[[Tensor], Tensor]:
    from timm.models.convnext import ConvNeXt

    ours, size = encoder.trunk, encoder.input_size
    with torch.device("meta"):
        trunk = ConvNeXt(
            num_classes=0,
            global_pool="",
            depths=tuple(len(stage.blocks) for stage in ours.stages),
            dims=tuple(stage.blocks[0].conv_dw.out_channels for stage in ours.stages),
            norm_eps=ours.head.norm.eps,
        )
    trunk.load_state_dict(ours.state_dict(), assign=True)
    trunk.eval()

    def call(pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != size:
            pixels = nn.functional.interpolate(pixels.half(), size=(size, size), mode="nearest")
        feature_map = trunk.head.norm(trunk.forward_features(pixels.to(encoder.dtype))).flatten(2).permute(0, 2, 1)
        return torch.cat([feature_map.mean(dim=1, keepdim=True), feature_map], dim=1)

    return call


def _timm_dinov2(encoder: Any) -> Callable[[Tensor], Tensor]:
    """The forward of timm itself, with a position table resampled beforehand."""
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

    ours = encoder.trunk
    with torch.device("meta"):
        trunk = VisionTransformer(
            img_size=encoder.input_size,
            patch_size=ours.patch_embed.proj.kernel_size[0],
            num_classes=0,
            embed_dim=encoder.embed_dim,
            depth=len(ours.blocks),
            num_heads=ours.blocks[0].attn.num_heads,
            mlp_ratio=(ours.blocks[0].mlp.fc1.out_features + 0.5) / encoder.embed_dim,
            init_values=1e-5,
            norm_layer=type(ours.norm),
            act_layer=nn.SiLU,
            mlp_layer=SwiGLUPacked,
        )
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = ours.norm.eps
    weights = {**ours.state_dict(), "pos_embed": encoder.resample_positions(ours.pos_embed, encoder.grid_size[0])}
    trunk.load_state_dict(weights, assign=True)
    trunk.eval()
    values = [torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_STD, CLIP_MEAN, IMAGENET_MEAN, IMAGENET_STD)]

    def call(pixels: Tensor) -> Tensor:
        clip_std, clip_mean, mean, std = (value.to(pixels.device) for value in values)
        return trunk.forward_features(((pixels * clip_std + clip_mean - mean) / std).to(encoder.dtype))

    return call


def _transformers_qformer(encoder: Any) -> Callable[[Tensor], Tensor]:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

    trunk = encoder.trunk
    tower, qformer = trunk.vision_model, trunk.qformer
    block, layer = tower.encoder.layers[0], qformer.encoder.layer[0]
    vision = Blip2VisionConfig(
        hidden_size=block.mlp.fc1.in_features,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(tower.encoder.layers),
        num_attention_heads=block.self_attn.num_heads,
        image_size=encoder.input_size,
        patch_size=tower.embeddings.patch_embedding.kernel_size[0],
    )
    queries = Blip2QFormerConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(qformer.encoder.layer),
        num_attention_heads=layer.attention.attention.num_heads,
        intermediate_size=layer.intermediate_query.dense.out_features,
        encoder_hidden_size=vision.hidden_size,
    )
    with torch.device("meta"):
        vision_model, query_model = Blip2VisionModel(vision), Blip2QFormerModel(queries)
    vision_model.load_state_dict(tower.state_dict(), assign=True)
    query_model.load_state_dict(qformer.state_dict(), assign=True)
    vision_model.eval()
    query_model.eval()

    def call(pixels: Tensor) -> Tensor:
        image = vision_model(pixel_values=pixels.to(encoder.dtype)).last_hidden_state
        tokens = trunk.query_tokens.expand(image.shape[0], -1, -1)
        return query_model(query_embeds=tokens, encoder_hidden_states=image).last_hidden_state

    return call


# Full widths, a few layers: seconds on a CPU.
QUICK = True
QUICK_OPTIONS: dict[str, dict[str, Any]] = {
    "clip_vit_large_patch14": {"num_layers": 2},
    "convnext_xxlarge": {"depths": (1, 1, 1, 1)},
    "dinov2_vit_giant_patch14": {"num_layers": 2},
    "blip2_qformer": {"vision_layers": 1, "num_layers": 2},
}
COMPETITORS: dict[str, tuple[str, Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "clip_vit_large_patch14": ("open_clip", _open_clip),
    "convnext_xxlarge": ("timm", _timm_convnext),
    "dinov2_vit_giant_patch14": ("timm", _timm_dinov2),
    "blip2_qformer": ("transformers", _transformers_qformer),
}


def cases(context: Context) -> Iterator[Case]:
    side = context.pick(224, 28)
    dtypes = [torch.bfloat16, torch.float32] if context.device.type == "cuda" or context.micro else [torch.bfloat16]
    for name, (competitor, make) in COMPETITORS.items():
        for dtype in dtypes:
            yield from _encoder_cases(context, name, competitor, make, dtype, side)


def _encoder_cases(
    context: Context, name: str, competitor: str, make: Callable[[Any], Any], dtype: torch.dtype, side: int
) -> Iterator[Case]:
    options = context.pick({}, MICRO[name], QUICK_OPTIONS[name])
    encoder = build_random(lambda: encoders.create(name, **options), context.device, dtype)
    candidates = {"sphinxkit": lambda pixels: encoder(pixels).tokens(), competitor: make(encoder)}
    tokens = encoder.num_prefix_tokens + encoder.grid_size[0] * encoder.grid_size[1]
    for views in context.on([1, 5, 80], [1, 5], [2], [1]):
        inputs = [(context.randn(views, 3, side, side),) for _ in range(2)]
        flops = count_flops(lambda: encoders.create(name, **options), (views, 3, side, side))
        shown = name + (f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if context.quick else "")
        yield Case(
            f"{shown}, {views} views of {side}, {str(dtype).removeprefix('torch.')}",
            candidates,
            Work(flops, nbytes(encoder, inputs[0]), views * tokens * encoder.embed_dim * dtype.itemsize, dtype=dtype),
            inputs,
            amount=views,
            unit="views",
            tolerance=TOLERANCE[dtype],
            repeats=context.on(None, 3, None),
        )
