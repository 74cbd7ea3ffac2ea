"""SPHINX written out in plain functions of a released checkpoint's own tensors: no sphinxkit, no encoder libraries.

An independent second opinion for checkpoints beyond the golden ones: it makes random checkpoints in the released layout
at any widths, and computes what they should give, in float64, straight from the formulas of the papers. On the golden
checkpoints it agrees with the public implementation (a test says so), which is what makes it an oracle for the others.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
ROWS = {
    "llama_ens": 1,
    "llama_ens5": 2,
    "llama_ens5p2": 2,
    "llama_ens10": 3,
    "llama_ens_light": 1,
    "llama_ens5_light": 2,
}
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def ffn_hidden(config: dict[str, Any]) -> int:
    hidden = int(2 * (4 * config["dim"]) / 3)
    if config.get("ffn_dim_multiplier"):
        hidden = int(config["ffn_dim_multiplier"] * hidden)
    multiple = config.get("multiple_of", 256)
    return multiple * ((hidden + multiple - 1) // multiple)


def is_light(llama_type: str) -> bool:
    return llama_type.endswith("light")


def image_size(llama_type: str) -> int:
    return ROWS[llama_type] * (512 if is_light(llama_type) else 224)


# ---- names and shapes ----------------------------------------------------------------------------------------------


def _linear(name: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def llm_shapes(config: dict[str, Any], vocab: int) -> Shapes:
    dim, hidden = config["dim"], ffn_hidden(config)
    kv_dim = dim // config["n_heads"] * (config.get("n_kv_heads") or config["n_heads"])
    shapes: Shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    for layer in range(config["n_layers"]):
        prefix = f"layers.{layer}"
        shapes |= {
            f"{prefix}.attention.wq.weight": (dim, dim),
            f"{prefix}.attention.wk.weight": (kv_dim, dim),
            f"{prefix}.attention.wv.weight": (kv_dim, dim),
            f"{prefix}.attention.wo.weight": (dim, dim),
            f"{prefix}.feed_forward.w1.weight": (hidden, dim),
            f"{prefix}.feed_forward.w2.weight": (dim, hidden),
            f"{prefix}.feed_forward.w3.weight": (hidden, dim),
            f"{prefix}.attention_norm.weight": (dim,),
            f"{prefix}.ffn_norm.weight": (dim,),
        }
    return shapes


def clip_shapes(clip: dict[str, Any], text: dict[str, Any]) -> Shapes:
    width, patch = clip["width"], clip["patch_size"]
    hidden = int(width * clip["mlp_ratio"])
    shapes: Shapes = {
        "clip.positional_embedding": (text["context_length"], text["width"]),
        "clip.text_projection": (text["width"], text["embed_dim"]),
        "clip.logit_scale": (),
        "clip.token_embedding.weight": (text["vocab_size"], text["width"]),
        **_norm("clip.ln_final", text["width"]),
        "clip.visual.class_embedding": (width,),
        "clip.visual.positional_embedding": ((clip["image_size"] // patch) ** 2 + 1, width),
        "clip.visual.proj": (width, text["embed_dim"]),
        "clip.visual.conv1.weight": (width, 3, patch, patch),
        **_norm("clip.visual.ln_pre", width),
        **_norm("clip.visual.ln_post", width),
    }
    for layer in range(clip["layers"]):
        prefix = f"clip.visual.transformer.resblocks.{layer}"
        shapes |= _norm(f"{prefix}.ln_1", width) | _norm(f"{prefix}.ln_2", width)
        shapes |= {f"{prefix}.attn.in_proj_weight": (3 * width, width), f"{prefix}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{prefix}.attn.out_proj", width, width)
        shapes |= _linear(f"{prefix}.mlp.c_fc", hidden, width) | _linear(f"{prefix}.mlp.c_proj", width, hidden)
    return shapes


def convnext_shapes(convnext: dict[str, Any]) -> Shapes:
    dims, root = convnext["dims"], "openclip_convnext_xxl"
    shapes: Shapes = {f"{root}.stem.0.weight": (dims[0], 3, 4, 4), f"{root}.stem.0.bias": (dims[0],)}
    shapes |= _norm(f"{root}.stem.1", dims[0]) | _norm(f"{root}.head.norm", dims[-1])
    for stage, (dim, depth) in enumerate(zip(dims, convnext["depths"], strict=True)):
        if stage:
            prefix = f"{root}.stages.{stage}.downsample"
            shapes |= _norm(f"{prefix}.0", dims[stage - 1])
            shapes |= {f"{prefix}.1.weight": (dim, dims[stage - 1], 2, 2), f"{prefix}.1.bias": (dim,)}
        for block in range(depth):
            prefix = f"{root}.stages.{stage}.blocks.{block}"
            shapes |= {f"{prefix}.gamma": (dim,), f"{prefix}.conv_dw.weight": (dim, 1, 7, 7)}
            shapes |= {f"{prefix}.conv_dw.bias": (dim,)} | _norm(f"{prefix}.norm", dim)
            shapes |= _linear(f"{prefix}.mlp.fc1", 4 * dim, dim) | _linear(f"{prefix}.mlp.fc2", dim, 4 * dim)
    return shapes


def dinov2_shapes(dino: dict[str, Any]) -> Shapes:
    dim, hidden, root = dino["embed_dim"], dino["hidden"], "dinov2_vitg14"
    positions = (dino["pretrain_image_size"] // dino["patch_size"]) ** 2 + 1
    shapes: Shapes = {
        f"{root}.cls_token": (1, 1, dim),
        f"{root}.pos_embed": (1, positions, dim),
        f"{root}.mask_token": (1, dim),
        f"{root}.patch_embed.proj.weight": (dim, 3, dino["patch_size"], dino["patch_size"]),
        f"{root}.patch_embed.proj.bias": (dim,),
        **_norm(f"{root}.norm", dim),
    }
    for layer in range(dino["layers"]):
        prefix = f"{root}.blocks.{layer}"
        shapes |= _norm(f"{prefix}.norm1", dim) | _norm(f"{prefix}.norm2", dim)
        shapes |= _linear(f"{prefix}.attn.qkv", 3 * dim, dim) | _linear(f"{prefix}.attn.proj", dim, dim)
        shapes |= _linear(f"{prefix}.mlp.w12", 2 * hidden, dim) | _linear(f"{prefix}.mlp.w3", dim, hidden)
        shapes |= {f"{prefix}.ls1.gamma": (dim,), f"{prefix}.ls2.gamma": (dim,)}
    return shapes


def qformer_shapes(vision: dict[str, Any], qformer: dict[str, Any]) -> Shapes:
    dim, patch, hidden = vision["hidden_size"], vision["patch_size"], vision["intermediate_size"]
    root = "qformer.vision_model"
    shapes: Shapes = {
        "qformer.query_tokens": (1, qformer["num_query_tokens"], qformer["hidden_size"]),
        f"{root}.embeddings.class_embedding": (1, 1, dim),
        f"{root}.embeddings.position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, dim),
        f"{root}.embeddings.patch_embedding.weight": (dim, 3, patch, patch),
        f"{root}.embeddings.patch_embedding.bias": (dim,),
        **_norm(f"{root}.post_layernorm", dim),
    }
    for layer in range(vision["layers"]):
        prefix = f"{root}.encoder.layers.{layer}"
        shapes |= _linear(f"{prefix}.self_attn.qkv", 3 * dim, dim) | _linear(f"{prefix}.self_attn.projection", dim, dim)
        shapes |= _norm(f"{prefix}.layer_norm1", dim) | _norm(f"{prefix}.layer_norm2", dim)
        shapes |= _linear(f"{prefix}.mlp.fc1", hidden, dim) | _linear(f"{prefix}.mlp.fc2", dim, hidden)
    width, inner = qformer["hidden_size"], qformer["intermediate_size"]
    shapes |= _norm("qformer.qformer.layernorm", width)
    for layer in range(qformer["layers"]):
        prefix = f"qformer.qformer.encoder.layer.{layer}"
        kinds = {"attention": width}
        if layer % qformer["cross_attention_frequency"] == 0:
            kinds["crossattention"] = qformer["encoder_hidden_size"]
        for kind, source in kinds.items():
            shapes |= _linear(f"{prefix}.{kind}.attention.query", width, width)
            shapes |= _linear(f"{prefix}.{kind}.attention.key", width, source)
            shapes |= _linear(f"{prefix}.{kind}.attention.value", width, source)
            shapes |= _linear(f"{prefix}.{kind}.output.dense", width, width)
            shapes |= _norm(f"{prefix}.{kind}.output.LayerNorm", width)
        shapes |= _linear(f"{prefix}.intermediate_query.dense", inner, width)
        shapes |= _linear(f"{prefix}.output_query.dense", width, inner)
        shapes |= _norm(f"{prefix}.output_query.LayerNorm", width)
    return shapes


def all_shapes(llama_type: str, config: dict[str, Any], encoders: dict[str, Any], vocab: int) -> Shapes:
    dim = config["dim"]
    shapes: Shapes = {"start_img": (1, 1, dim), "end_img": (1, 1, dim)} | llm_shapes(config, vocab)
    shapes |= convnext_shapes(encoders["convnext"]) | dinov2_shapes(encoders["dinov2"])
    width = encoders["convnext"]["dims"][-1] + encoders["dinov2"]["embed_dim"]
    if not is_light(llama_type):
        shapes |= clip_shapes(encoders["clip"], encoders["clip_text_leftover"])
        shapes |= qformer_shapes(encoders["blip2_vision"], encoders["qformer"])
        width += encoders["clip"]["width"]
        shapes |= _linear("qformer_proj.0", dim, encoders["qformer"]["hidden_size"]) | _norm("qformer_proj.1", dim)
    shapes |= _linear("visual_proj.0", dim, width) | _norm("visual_proj.1", dim)
    return {f"llma.{name}": shape for name, shape in shapes.items()}


# ---- files ---------------------------------------------------------------------------------------------------------


def split_dim(name: str) -> int | None:
    """Along which dimension a tensor is cut among tensor-parallel shards; None: every shard has all of it."""
    if name.endswith("tok_embeddings.weight"):
        return 1
    if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) and ".layers." in name:
        return 1
    cut = ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight", "w1.weight", "w3.weight")
    is_block = name.startswith("llma.layers.") and name.endswith(cut)
    return 0 if is_block or name == "llma.output.weight" else None


def write_checkpoint(
    folder: Path,
    llama_type: str,
    config: dict[str, Any],
    encoders: dict[str, Any],
    tokenizer: bytes,
    *,
    vocab: int,
    num_shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A random checkpoint in the released layout; gives the whole tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in all_shapes(llama_type, config, encoders, vocab).items():
        fan_in = math.prod(shape[1:])
        noise = torch.randn(shape, generator=generator)
        if name.endswith((".gamma",)) or (len(shape) == 1 and name.endswith(".weight")):
            tensor = 1 + 0.2 * noise
        elif len(shape) >= 2 and "embed" not in name and "token" not in name:
            tensor = noise / fan_in**0.5
        else:
            tensor = 0.5 * noise
        tensors[name] = tensor.to(dtype)
    folder.mkdir(parents=True)
    for rank in range(num_shards):
        shard = {}
        for name, tensor in tensors.items():
            dim = split_dim(name)
            shard[name] = tensor if dim is None else tensor.chunk(num_shards, dim)[rank].clone()
        torch.save({"model": shard}, folder / f"consolidated.{rank:02d}-of-{num_shards:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "meta.json").write_text(json.dumps({"llama_type": llama_type}))
    (folder / "encoders.json").write_text(json.dumps(encoders))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return tensors


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a released-layout directory."""
    shards = [torch.load(path, weights_only=True)["model"] for path in sorted(folder.glob("*.model.pth"))]
    whole = {}
    for name, tensor in shards[0].items():
        dim = split_dim(name)
        whole[name] = tensor if dim is None else torch.cat([shard[name] for shard in shards], dim)
    return whole


# ---- the model -----------------------------------------------------------------------------------------------------


class Oracle:
    """What a checkpoint computes, in float64 except for the pixels (which the public implementation rounds)."""

    def __init__(self, llama_type: str, config: dict[str, Any], encoders: dict[str, Any], tensors: dict[str, Tensor]):
        self.type, self.config, self.encoders = llama_type, config, encoders
        self.tensors = {name.removeprefix("llma."): tensor.double() for name, tensor in tensors.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + eps).sqrt() * weight + bias

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        return (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)

    # -- views

    def views(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V, 3, S, S) for ConvNeXt (before its own resize) and for everything that sees 224."""

        def through_half(x: Tensor, size: int, mode: str) -> Tensor:
            options = {} if mode == "nearest" else {"align_corners": False}
            return F.interpolate(x.half(), size=(size, size), mode=mode, **options).float()

        def crops(x: Tensor, rows: int) -> list[Tensor]:
            side = x.shape[-1] // rows
            return [
                x[:, :, r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(rows)
            ]

        rows = ROWS[self.type]
        if is_light(self.type):
            small = [through_half(pixels, 224, "bicubic")]
            large = [through_half(pixels, 512, "bicubic" if rows > 1 else "nearest")]
            if rows > 1:
                small += crops(through_half(pixels, 224 * rows, "bicubic"), rows)
                large += crops(pixels, rows)
        else:
            small = [pixels] if rows == 1 else [through_half(pixels, 224, "bicubic"), *crops(pixels, rows)]
            large = [through_half(view, 256, "nearest") for view in small]
        return torch.stack(large, 1), torch.stack(small, 1)

    # -- encoders: (N, 3, S, S) -> (N, tokens, width)

    def patches(self, x: Tensor, name: str, patch: int) -> Tensor:
        map_ = F.conv2d(x.double(), self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"), stride=patch)
        return map_.flatten(2).transpose(1, 2)

    def clip(self, x: Tensor) -> Tensor:
        facts, root = self.encoders["clip"], "clip.visual"
        quick = "quick" in facts["activation"]
        tokens = self.patches(x, f"{root}.conv1", facts["patch_size"])
        first = self.tensors[f"{root}.class_embedding"].expand(len(x), 1, -1)
        tokens = torch.cat([first, tokens], 1) + self.tensors[f"{root}.positional_embedding"]
        tokens = self.norm(tokens, f"{root}.ln_pre", 1e-5)
        for layer in range(facts["layers"]):
            name = f"{root}.transformer.resblocks.{layer}"
            normed = self.norm(tokens, f"{name}.ln_1", 1e-5)
            weight, bias = self.tensors[f"{name}.attn.in_proj_weight"], self.tensors[f"{name}.attn.in_proj_bias"]
            q, k, v = F.linear(normed, weight, bias).chunk(3, -1)
            tokens = tokens + self.linear(self.attend(q, k, v, facts["heads"]), f"{name}.attn.out_proj")
            inner = self.linear(self.norm(tokens, f"{name}.ln_2", 1e-5), f"{name}.mlp.c_fc")
            inner = inner * torch.sigmoid(1.702 * inner) if quick else F.gelu(inner)
            tokens = tokens + self.linear(inner, f"{name}.mlp.c_proj")
        return self.norm(tokens, f"{root}.ln_post", 1e-5)

    def convnext(self, x: Tensor) -> Tensor:
        facts, root = self.encoders["convnext"], "openclip_convnext_xxl"

        def channels_last(x: Tensor, name: str) -> Tensor:
            return self.norm(x.permute(0, 2, 3, 1), name, 1e-5).permute(0, 3, 1, 2)

        def conv(x: Tensor, name: str, **options: int) -> Tensor:
            return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

        map_ = channels_last(conv(x.double(), f"{root}.stem.0", stride=4), f"{root}.stem.1")
        for stage, depth in enumerate(facts["depths"]):
            if stage:
                name = f"{root}.stages.{stage}.downsample"
                map_ = conv(channels_last(map_, f"{name}.0"), f"{name}.1", stride=2)
            for block in range(depth):
                name = f"{root}.stages.{stage}.blocks.{block}"
                inner = conv(map_, f"{name}.conv_dw", padding=3, groups=map_.shape[1]).permute(0, 2, 3, 1)
                inner = self.linear(self.norm(inner, f"{name}.norm", 1e-5), f"{name}.mlp.fc1")
                inner = self.linear(F.gelu(inner), f"{name}.mlp.fc2") * self.tensors[f"{name}.gamma"]
                map_ = map_ + inner.permute(0, 3, 1, 2)
        map_ = channels_last(map_, f"{root}.head.norm")
        if map_.shape[-1] == 8:
            map_ = map_.repeat_interleave(2, -1).repeat_interleave(2, -2)
        tokens = map_.flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

    def dinov2(self, x: Tensor) -> Tensor:
        facts, root = self.encoders["dinov2"], "dinov2_vitg14"
        x = (x * CLIP_STD + CLIP_MEAN - IMAGENET_MEAN) / IMAGENET_STD
        tokens = self.patches(x, f"{root}.patch_embed.proj", facts["patch_size"])
        positions = self.tensors[f"{root}.pos_embed"]
        side, grid = int((positions.shape[1] - 1) ** 0.5), int(tokens.shape[1] ** 0.5)
        table = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if side != grid:
            scale = (grid + 0.1) / side
            table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
        positions = torch.cat([positions[:, :1], table.double().flatten(2).transpose(1, 2)], 1)
        tokens = torch.cat([self.tensors[f"{root}.cls_token"].expand(len(x), -1, -1), tokens], 1) + positions
        for layer in range(facts["layers"]):
            name = f"{root}.blocks.{layer}"
            q, k, v = self.linear(self.norm(tokens, f"{name}.norm1", 1e-6), f"{name}.attn.qkv").chunk(3, -1)
            inner = self.linear(self.attend(q, k, v, facts["heads"]), f"{name}.attn.proj")
            tokens = tokens + inner * self.tensors[f"{name}.ls1.gamma"]
            gate, up = self.linear(self.norm(tokens, f"{name}.norm2", 1e-6), f"{name}.mlp.w12").chunk(2, -1)
            inner = self.linear(F.silu(gate) * up, f"{name}.mlp.w3")
            tokens = tokens + inner * self.tensors[f"{name}.ls2.gamma"]
        return self.norm(tokens, f"{root}.norm", 1e-6)

    def qformer(self, x: Tensor) -> Tensor:
        vision, facts, root = self.encoders["blip2_vision"], self.encoders["qformer"], "qformer.vision_model"
        tokens = self.patches(x, f"{root}.embeddings.patch_embedding", vision["patch_size"])
        first = self.tensors[f"{root}.embeddings.class_embedding"].expand(len(x), -1, -1)
        tokens = torch.cat([first, tokens], 1) + self.tensors[f"{root}.embeddings.position_embedding"]
        for layer in range(vision["layers"]):
            name = f"{root}.encoder.layers.{layer}"
            q, k, v = self.linear(self.norm(tokens, f"{name}.layer_norm1", 1e-6), f"{name}.self_attn.qkv").chunk(3, -1)
            tokens = tokens + self.linear(self.attend(q, k, v, vision["heads"]), f"{name}.self_attn.projection")
            inner = self.linear(self.norm(tokens, f"{name}.layer_norm2", 1e-6), f"{name}.mlp.fc1")
            tokens = tokens + self.linear(F.gelu(inner), f"{name}.mlp.fc2")
        image = self.norm(tokens, f"{root}.post_layernorm", 1e-6)
        states = self.norm(
            self.tensors["qformer.query_tokens"].expand(len(x), -1, -1), "qformer.qformer.layernorm", 1e-12
        )
        for layer in range(facts["layers"]):
            name = f"qformer.qformer.encoder.layer.{layer}"
            for kind, source in (("attention", None), ("crossattention", image)):
                if kind == "crossattention" and layer % facts["cross_attention_frequency"]:
                    continue
                other = states if source is None else source
                q = self.linear(states, f"{name}.{kind}.attention.query")
                k = self.linear(other, f"{name}.{kind}.attention.key")
                v = self.linear(other, f"{name}.{kind}.attention.value")
                out = self.linear(self.attend(q, k, v, facts["heads"]), f"{name}.{kind}.output.dense")
                states = self.norm(states + out, f"{name}.{kind}.output.LayerNorm", 1e-12)
            inner = F.gelu(self.linear(states, f"{name}.intermediate_query.dense"))
            out = self.linear(inner, f"{name}.output_query.dense")
            states = self.norm(states + out, f"{name}.output_query.LayerNorm", 1e-12)
        return states

    # -- image tokens and logits

    def project(self, x: Tensor, name: str) -> Tensor:
        return self.norm(self.linear(x, f"{name}.0"), f"{name}.1", 1e-5)

    def encode_images(self, pixels: Tensor) -> Tensor:
        large, small = self.views(pixels)
        batch, views = small.shape[:2]
        pieces = []
        for view in range(views):
            parts = [self.convnext(large[:, view]), self.dinov2(small[:, view])]
            if not is_light(self.type):
                parts.insert(0, self.clip(small[:, view]))
            mixed = torch.cat(parts, -1)
            if self.type == "llama_ens5p2" and view > 0:
                grid = mixed[:, 1:].unflatten(1, (8, 2, 8, 2)).mean((2, 4)).flatten(1, 2)
                mixed = torch.cat([mixed[:, :1], grid], 1)
            tokens = self.project(mixed, "visual_proj")
            if not is_light(self.type):
                tokens = torch.cat([self.project(self.qformer(small[:, view]), "qformer_proj"), tokens], 1)
            image_delimiters = [self.tensors[name].expand(batch, -1, -1) for name in ("start_img", "end_img")]
            pieces += [image_delimiters[0], tokens, image_delimiters[1]]
        return torch.cat(pieces, 1)

    def logits(self, token_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        x = self.tensors["tok_embeddings.weight"][token_ids]
        skipped = 0
        if pixels is not None:
            images = self.encode_images(pixels)
            skipped = images.shape[1]
            x = torch.cat([x[:, :1], images, x[:, 1:]], 1)
        heads = self.config["n_heads"]
        kv_heads = self.config.get("n_kv_heads") or heads
        head_dim = self.config["dim"] // heads
        eps = self.config.get("norm_eps", 1e-5)
        inverse = self.config.get("rope_theta", 10000.0) ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        positions = torch.arange(x.shape[1]).double() * (self.config.get("rope_scaling") or 1.0)
        turn = torch.polar(torch.ones(1).double(), positions[:, None] * inverse)[:, None]

        def rotate(x: Tensor, count: int) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(-1, (count, head_dim // 2, 2)).contiguous())
            return torch.view_as_real(pairs * turn).flatten(-3)

        def rms(x: Tensor, name: str) -> Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.tensors[f"{name}.weight"]

        def repeat(x: Tensor) -> Tensor:
            return x.unflatten(-1, (kv_heads, head_dim)).repeat_interleave(heads // kv_heads, -2).flatten(-2)

        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in range(self.config["n_layers"]):
            name = f"layers.{layer}"
            normed = rms(x, f"{name}.attention_norm")
            q = rotate(self.linear(normed, f"{name}.attention.wq"), heads)
            k = repeat(rotate(self.linear(normed, f"{name}.attention.wk"), kv_heads))
            v = repeat(self.linear(normed, f"{name}.attention.wv"))
            x = x + self.linear(self.attend(q, k, v, heads, mask), f"{name}.attention.wo")
            normed = rms(x, f"{name}.ffn_norm")
            inner = F.silu(self.linear(normed, f"{name}.feed_forward.w1")) * self.linear(
                normed, f"{name}.feed_forward.w3"
            )
            x = x + self.linear(inner, f"{name}.feed_forward.w2")
        return self.linear(rms(x, "norm"), "output")[:, skipped:]
