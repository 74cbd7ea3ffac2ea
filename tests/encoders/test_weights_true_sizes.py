"""Published models at their true size: names and shapes on the meta device, and which bytes of a file are touched."""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    OPTConfig,
)

from sphinxkit import encoders
from sphinxkit.encoders import Encoder
from sphinxkit.encoders.weights import _detect, _errors
from sphinxkit.tensor_files import StoredTensor

Shapes = Mapping[str, tuple[int, ...]]


def not_read() -> torch.Tensor:
    raise AssertionError("names and shapes need no data")


def fits(encoder: Encoder, shapes: Shapes) -> list[str]:
    """The format that was found and its errors, as ``load_weights`` sees a file of these names and shapes."""
    tensors = {name: StoredTensor(Path("file"), name, shape, torch.float32, not_read) for name, shape in shapes.items()}
    format = _detect(encoder, tensors, "file")
    slots = encoder.state_dict(keep_vars=True)
    return [format.name, *_errors(encoder, slots, format.translate(tensors, encoder.trunk), {})]


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_clip_vit_large_patch14() -> None:
    with torch.device("meta"):
        encoder = encoders.create("clip_vit_large_patch14")
        config = open_clip.get_model_config("ViT-L-14")
        theirs = {"open_clip": open_clip.CLIP(**config)}
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        }
        theirs["Hugging Face CLIPModel"] = CLIPModel(CLIPConfig(vision_config=vision))
        theirs["timm CLIP"] = timm.create_model("vit_large_patch14_clip_224.openai")
    for name, module in theirs.items():
        assert fits(encoder, shapes_of(module)) == [name]
    manifest = shapes_of(theirs["open_clip"]) | {"input_resolution": (), "context_length": (), "vocab_size": ()}
    assert fits(encoder, manifest) == ["OpenAI's CLIP state dict"]


def test_convnext_xxlarge() -> None:
    with torch.device("meta"):
        encoder = encoders.create("convnext_xxlarge")
        theirs = open_clip.CLIP(**open_clip.get_model_config("convnext_xxlarge"))
        assert fits(encoder, shapes_of(theirs)) == ["open_clip ConvNeXt"]
        assert fits(encoder, shapes_of(timm.create_model("convnext_xxlarge"))) == ["timm ConvNeXt"]


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_giant(registers: int) -> None:
    with torch.device("meta"):
        encoder = encoders.create("dinov2_vit_giant_patch14", num_register_tokens=registers)
        name = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
        theirs = shapes_of(timm.create_model(name))
        if not registers:
            config = Dinov2Config(
                hidden_size=1536,
                num_hidden_layers=40,
                num_attention_heads=24,
                image_size=518,
                patch_size=14,
                use_swiglu_ffn=True,
            )
            assert fits(encoder, shapes_of(Dinov2Model(config))) == ["Hugging Face Dinov2Model"]
    assert fits(encoder, theirs) == ["timm DINOv2 with registers" if registers else "timm DINOv2"]
    # dinov2_vitg14_pretrain.pth and dinov2_vitg14_reg4_pretrain.pth, by the names of their repository
    own = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): shape for name, shape in theirs.items()}
    own |= {"mask_token": (1, 1536), "pos_embed": (1, 1370, 1536)}
    if registers:
        own["register_tokens"] = own.pop("reg_token")
    assert fits(encoder, own) == ["DINOv2's own"]


def blip2_opt_shapes() -> Shapes:
    """Salesforce/blip2-opt-2.7b; transformers' defaults are its vision tower and Q-Former."""
    text = OPTConfig(
        hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, vocab_size=50304,
        word_embed_proj_dim=2560,
    )  # fmt: skip
    with torch.device("meta"):
        return shapes_of(Blip2ForConditionalGeneration(Blip2Config(text_config=text.to_dict())))


def test_blip2_opt() -> None:
    with torch.device("meta"):
        encoder = encoders.create("blip2_qformer")
    assert fits(encoder, blip2_opt_shapes()) == ["Hugging Face Blip2Model"]


@pytest.mark.parametrize("model", ["vit_so400m_patch14_siglip_384", "vit_large_patch16_dinov3"])
def test_timm(model: str) -> None:
    with torch.device("meta"):
        encoder = encoders.create("timm", model=model)
        theirs = timm.create_model(model).state_dict()
    tensors = {
        name: StoredTensor(Path("file"), name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in theirs.items()
    }
    format = _detect(encoder, tensors, "file")
    translation = format.translate(tensors, encoder.trunk)
    assert (format.name, _errors(encoder, encoder.state_dict(keep_vars=True), translation, {})) == ("timm", [])
    assert all(name.startswith(("attn_pool.", "head.")) for name in translation.skipped)


def write_sparse(path: Path, shapes: Shapes) -> int:
    """A safetensors file of zeros that takes no room on the disk; returns its size."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + position)
    return path.stat().st_size


def cached_bytes(path: Path) -> int:
    """Bytes of a file that are in memory, by mincore(2)."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        size, page = len(mapped), mmap.PAGESIZE
        pages = (ctypes.c_ubyte * (-(-size // page)))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return sum(flag & 1 for flag in bytes(pages)) * page


@pytest.mark.slow
def test_only_the_vision_and_qformer_tensors_are_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = blip2_opt_shapes()
    path = tmp_path / "model.safetensors"
    size = write_sparse(path, shapes)
    with torch.device("meta"):
        encoder: Any = encoders.create("blip2_qformer").bfloat16()
    encoder = encoder.to_empty(device="cpu")
    report = encoders.load_weights(encoder, path)
    needed = sum(2 * tensor.numel() for tensor in encoder.parameters())
    touched = cached_bytes(path)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{size:,} bytes in the file, {needed:,} needed, {report.num_bytes:,} read, {touched:,} cached\n"
        )
    assert report.num_bytes == needed
    assert needed <= touched <= 1.02 * needed  # whole pages, and what the system reads ahead
    assert size > 3 * touched
