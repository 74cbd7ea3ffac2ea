"""Every encoder of the four small released-layout checkpoints against what the public implementation computed."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sphinxkit.encoders import Encoder, create
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, resize_pixels

# float32 rounding between library versions: 2e-6 was seen; every single mistake known costs 6e-5 or more.
TOKENS_ATOL = 1e-5
# float32 on CUDA sums in another order and has its own exp and erf.
CUDA_ATOL = 1e-4
# bfloat16 keeps eight bits: 0.4 % a step, a few steps through the layers.
BFLOAT16_MEAN = 0.05

IMAGE_SIZE = {"llama_ens": 224, "llama_ens5": 448, "llama_ens_light": 512, "llama_ens5_light": 1024}
WITH_CLIP = ("llama_ens", "llama_ens5")
# Where the names of each encoder begin in the checkpoint, and its options there.
PREFIX = {
    "clip_vit_large_patch14": "llma.clip.visual.",
    "convnext_xxlarge": "llma.openclip_convnext_xxl.",
    "dinov2_vit_giant_patch14": "llma.dinov2_vitg14.",
    "blip2_qformer": "llma.qformer.",
}
UNUSED = ("llma.clip.visual.proj", "llma.dinov2_vitg14.mask_token")


def options(folder: Path, name: str) -> dict[str, Any]:
    facts = json.loads((folder / "encoders.json").read_text())
    if name == "clip_vit_large_patch14":
        clip = facts["clip"]
        return {
            "activation": "gelu",
            "embed_dim": clip["width"],
            "num_layers": clip["layers"],
            "num_heads": clip["heads"],
        }
    if name == "convnext_xxlarge":
        size = 512 if "light" in folder.name else 256
        return {"input_size": size, "dims": facts["convnext"]["dims"], "depths": facts["convnext"]["depths"]}
    if name == "dinov2_vit_giant_patch14":
        dino = facts["dinov2"]
        return {"embed_dim": dino["embed_dim"], "num_layers": dino["layers"], "num_heads": dino["heads"]}
    tower, qformer = facts["blip2_vision"], facts["qformer"]
    return {
        "vision_dim": tower["hidden_size"],
        "vision_layers": tower["layers"],
        "vision_heads": tower["heads"],
        "vision_hidden_dim": tower["intermediate_size"],
        "embed_dim": qformer["hidden_size"],
        "num_layers": qformer["layers"],
        "num_heads": qformer["heads"],
        "hidden_dim": qformer["intermediate_size"],
    }


@cache
def shard(folder: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = torch.load(folder / "consolidated.00-of-02.model.pth", weights_only=True)["model"]
    return model


def build(folder: Path, name: str, **more: Any) -> Encoder:
    encoder = create(name, **{**options(folder, name), **more})
    state = {
        "trunk."
        + key.removeprefix(PREFIX[name]).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value
        for key, value in shard(folder).items()
        if key.startswith(PREFIX[name]) and key not in UNUSED
    }
    encoder.load_state_dict(state)
    return encoder


def crops(pixels: Tensor, side: int) -> Tensor:
    rows = [pixels[:, :, y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
    return torch.cat(rows)


@cache
def views(golden: Path, name: str) -> tuple[Tensor, Tensor]:
    """(views of CLIP, DINOv2 and the Q-Former, views of ConvNeXt) of the square image."""
    size = IMAGE_SIZE[name]
    image = Image.open(golden / "images" / "square.png").convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pixels = ((values - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1))[None]
    if name == "llama_ens":
        return pixels, pixels
    small = resize_pixels(pixels, (224, 224), "bicubic")
    if name == "llama_ens5":
        both = torch.cat([small, crops(pixels, 224)])
        return both, both
    if name == "llama_ens_light":
        return small, resize_pixels(pixels, (512, 512), "nearest")
    half = resize_pixels(pixels, (448, 448), "bicubic")
    large = resize_pixels(pixels, (512, 512), "bicubic")
    return torch.cat([small, crops(half, 224)]), torch.cat([large, crops(pixels, 512)])


@cache
def expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "golden.safetensors")


def stored_rows(folder: Path) -> list[int]:
    rows: list[int] = json.loads((folder / "golden.json").read_text())["stored_encoder_views"]
    return rows


def assert_tokens(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOKENS_ATOL)


@pytest.mark.parametrize("name", IMAGE_SIZE)
def test_pixels_are_the_public_ones(golden: Path, name: str) -> None:
    """The views made here are the golden ones, so that the tests below compare encoders and nothing else."""
    digest = json.loads((golden / name / "golden.json").read_text()).get("view0_224_sha256_of_float32")
    small = views(golden, name)[0][0]
    if digest is not None and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert hashlib.sha256(small.contiguous().numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("name", WITH_CLIP)
def test_clip(golden: Path, name: str) -> None:
    folder = golden / name
    pixels = views(golden, name)[0][stored_rows(folder)]
    assert_tokens(build(folder, "clip_vit_large_patch14")(pixels).tokens(), expected(folder)["enc.clip_tokens"])
    quick = build(folder, "clip_vit_large_patch14", activation="quick_gelu")(pixels).tokens()
    assert (quick - expected(folder)["enc.clip_tokens"]).abs().max() > 100 * TOKENS_ATOL


@pytest.mark.parametrize("name", IMAGE_SIZE)
def test_convnext(golden: Path, name: str) -> None:
    folder = golden / name
    features = build(folder, "convnext_xxlarge")(views(golden, name)[1][stored_rows(folder)])
    side = features.grid[0]
    assert features.grid == ((16, 16) if "light" in name else (8, 8))
    grid = features.patches.transpose(1, 2).unflatten(2, (side, side))
    assert_tokens(grid[:1], expected(folder)["enc.convnext_map.view0"])
    repeat = 16 // side
    repeated = grid.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3).flatten(2).transpose(1, 2)
    assert_tokens(torch.cat([features.prefix, repeated], dim=1), expected(folder)["enc.convnext_tokens"])


@pytest.mark.parametrize("name", IMAGE_SIZE)
def test_dinov2(golden: Path, name: str) -> None:
    folder = golden / name
    features = build(folder, "dinov2_vit_giant_patch14")(views(golden, name)[0][stored_rows(folder)])
    assert_tokens(features.tokens(), expected(folder)["enc.dinov2_tokens"])


@pytest.mark.parametrize("name", WITH_CLIP)
def test_qformer(golden: Path, name: str) -> None:
    folder = golden / name
    encoder: Any = build(folder, "blip2_qformer")
    pixels = views(golden, name)[0]
    with torch.no_grad():
        image_tokens = encoder.trunk.vision_model(pixels[:1])
    assert_tokens(image_tokens, expected(folder)["enc.blip2_vision_last_hidden.view0"])
    assert_tokens(encoder(pixels).tokens(), expected(folder)["enc.qformer_last_hidden"])


@pytest.mark.parametrize(
    ("encoder", "tensor", "wrong"),
    [
        ("blip2_qformer", "enc.qformer_last_hidden", {"norm_eps": 1e-5}),
        ("blip2_qformer", "enc.qformer_last_hidden", {"cross_attention_frequency": 1}),
        ("convnext_xxlarge", "enc.convnext_map.view0", {"norm_eps": 1e-6}),
        ("convnext_xxlarge", "enc.convnext_map.view0", {"activation": "gelu_tanh"}),
        ("dinov2_vit_giant_patch14", "enc.dinov2_tokens", {"norm_eps": 1e-4}),
    ],
)
def test_the_tolerance_catches_one_wrong_constant(
    golden: Path, encoder: str, tensor: str, wrong: dict[str, Any]
) -> None:
    folder = golden / "llama_ens"
    if "cross_attention_frequency" in wrong:  # other layers, other names: the checkpoint does not even fit
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*layer\.1\.crossattention"):
            build(folder, encoder, **wrong)
        return
    features = build(folder, encoder, **wrong)(views(golden, "llama_ens")[0])
    want = expected(folder)[tensor]
    got = features.patches.transpose(1, 2).unflatten(2, features.grid) if want.ndim == 4 else features.tokens()
    assert (got - want).abs().max() > 3 * TOKENS_ATOL


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "encoder"), [*(("llama_ens5", encoder) for encoder in PREFIX), ("llama_ens5_light", "convnext_xxlarge")]
)
def test_cuda_agrees_with_cpu(golden: Path, name: str, encoder: str) -> None:
    network = build(golden / name, encoder)
    pixels = views(golden, name)[int(encoder == "convnext_xxlarge")]
    if pixels.shape[2] != network.input_size:  # made on the CPU, so that only the network is compared
        pixels = resize_pixels(pixels, (network.input_size, network.input_size), network.info.resize_mode)
    on_cpu = network(pixels).tokens()
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's convolutions default to TF32
        on_cuda = network.cuda()(pixels.cuda()).tokens().cpu()
    torch.testing.assert_close(on_cuda, on_cpu, rtol=0, atol=CUDA_ATOL)
    in_half = network.bfloat16()(pixels.cuda()).tokens().float().cpu()
    assert (in_half - on_cpu).abs().mean() < BFLOAT16_MEAN * on_cpu.abs().mean()
