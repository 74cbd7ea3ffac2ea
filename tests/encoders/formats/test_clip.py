"""CLIP's published formats: upstream's module with random weights, saved by upstream's writer, read here."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import build_model_from_openai_state_dict, set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf as save_open_clip
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from sphinxkit import encoders
from sphinxkit.encoders import ClipEncoder, LoadedWeights
from sphinxkit.errors import CheckpointError
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD

# Tokens of order one to five through at most three float32 blocks in another order of sums. QuickGELU for GELU, a
# swapped projection or a norm left out cost 1e-2 or more.
TOKENS_ATOL = 1e-5

# (embed_dim, num_layers, num_heads, patch_size): two widths, two depths
SIZES = [(32, 1, 2, 14), (48, 3, 4, 7)]
SIDE = 42


class NoTokenizer:
    """open_clip's writer saves a tokenizer too; the weights do not need one."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def open_clip_config(size: tuple[int, int, int, int], quick_gelu: bool) -> dict[str, Any]:
    width, layers, heads, patch = size
    return {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": SIDE,
            "layers": layers,
            "width": width,
            "patch_size": patch,
            "head_width": width // heads,
        },
        "text_cfg": {"context_length": 7, "vocab_size": 31, "width": 16, "heads": 2, "layers": 2},
    }


def visual_tokens(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Class token and patches of open_clip's own forward, all through its last norm."""
    tower: Any = visual
    tower.proj, tower.output_tokens = None, True
    with torch.no_grad():
        class_token, patches = tower.eval()(pixels)
    return torch.cat([class_token[:, None], patches], dim=1)


def ours(size: tuple[int, int, int, int], source: Path, **options: Any) -> ClipEncoder:
    width, layers, heads, patch = size
    encoder = encoders.create(
        "clip_vit_large_patch14",
        weights=source,
        image_size=SIDE,
        patch_size=patch,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        **options,
    )
    assert isinstance(encoder, ClipEncoder)
    return encoder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("safetensors", [False, True])
def test_open_clip(
    size: tuple[int, int, int, int],
    quick_gelu: bool,
    safetensors: bool,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    config = open_clip_config(size, quick_gelu)
    model: Any = randomize(open_clip.CLIP(**config))
    set_model_preprocess_cfg(model, {"mean": CLIP_MEAN, "std": CLIP_STD})
    save_open_clip(model, NoTokenizer(), config, str(tmp_path), safe_serialization=safetensors)
    encoder = ours(size, tmp_path)  # built with the default activation; the files' is taken
    assert encoder.info.activation == ("quick_gelu" if quick_gelu else "gelu")
    pixels = random_pixels(2, SIDE)
    expected = visual_tokens(model.visual, pixels)
    torch.testing.assert_close(encoder(pixels).tokens(), expected, rtol=0, atol=TOKENS_ATOL)


@pytest.mark.parametrize("size", [(64, 1, 1, 14), (128, 2, 2, 7)])  # OpenAI's heads are 64 wide
def test_openais_state_dict(
    size: tuple[int, int, int, int],
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    config = open_clip_config(size, True)
    config["text_cfg"] |= {"width": 64, "heads": 1}
    state = randomize(open_clip.CLIP(**config)).half().state_dict()
    facts = {"input_resolution": SIDE, "context_length": 7, "vocab_size": 31}
    state |= {name: torch.tensor(value) for name, value in facts.items()}  # as torch.jit.load(...).state_dict() has
    torch.save(state, tmp_path / "clip.pt")
    model: Any = build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float()
    encoder = ours(size, tmp_path / "clip.pt", activation="gelu")
    assert encoder.info.activation == "quick_gelu"
    pixels = random_pixels(2, SIDE)
    torch.testing.assert_close(encoder(pixels).tokens(), visual_tokens(model.visual, pixels), rtol=0, atol=TOKENS_ATOL)


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(path, "w") as archive:  # the records that torch.jit.save writes and torch.save does not
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"archive/{name}", b"")
    with pytest.raises(CheckpointError, match="refused: a TorchScript archive, which is a program") as caught:
        ours(SIZES[0], path)
    assert "hf://openai/clip-vit-large-patch14" in str(caught.value)
    assert "torch.jit.load" in str(caught.value)


def vision_config(size: tuple[int, int, int, int], activation: str) -> CLIPVisionConfig:
    width, layers, heads, patch = size
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=patch,
        hidden_act=activation,
    )


def hf_tokens(vision: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = vision.post_layernorm(vision.eval()(pixel_values=pixels).last_hidden_state)
    return hidden


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("theirs", "activation"), [("quick_gelu", "quick_gelu"), ("gelu", "gelu")])
def test_hugging_face_clip_model(
    size: tuple[int, int, int, int],
    theirs: str,
    activation: str,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config(size, theirs).to_dict())
    model: Any = randomize(CLIPModel(config))
    model.save_pretrained(tmp_path)
    encoder = ours(size, tmp_path)
    assert encoder.info.activation == activation
    pixels = random_pixels(2, SIDE)
    expected = hf_tokens(model.vision_model, pixels)
    torch.testing.assert_close(encoder(pixels).tokens(), expected, rtol=0, atol=TOKENS_ATOL)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", ["", "vision_model."])  # transformers 5 and 4 write the names so
def test_hugging_face_clip_vision_model(
    size: tuple[int, int, int, int],
    prefix: str,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    model: Any = randomize(CLIPVisionModel(vision_config(size, "gelu")))
    model.save_pretrained(tmp_path)
    if prefix:
        names = {f"{prefix}{name.removeprefix(prefix)}": tensor for name, tensor in model.state_dict().items()}
        (tmp_path / "model.safetensors").unlink()
        torch.save(names, tmp_path / "pytorch_model.bin")
    encoder = ours(size, tmp_path)
    assert encoder.info.activation == "gelu"
    pixels = random_pixels(2, SIDE)
    expected = hf_tokens(getattr(model, "vision_model", model), pixels)
    torch.testing.assert_close(encoder(pixels).tokens(), expected, rtol=0, atol=TOKENS_ATOL)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", ["vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"])
@pytest.mark.parametrize("safetensors", [False, True])
def test_timm(
    size: tuple[int, int, int, int],
    architecture: str,
    safetensors: bool,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    width, layers, heads, patch = size
    options = {"embed_dim": width, "depth": layers, "num_heads": heads, "patch_size": patch, "img_size": SIDE}
    model: Any = randomize(timm.create_model(architecture, **options)).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=safetensors)
    encoder = ours(size, tmp_path)
    assert encoder.info.activation == ("quick_gelu" if "quickgelu" in architecture else "gelu")
    pixels = random_pixels(2, SIDE)
    with torch.no_grad():
        expected = model.forward_features(pixels)
    torch.testing.assert_close(encoder(pixels).tokens(), expected, rtol=0, atol=TOKENS_ATOL)


def test_what_was_found_is_said(
    tmp_path: Path, randomize: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    size = SIZES[0]
    model = randomize(open_clip.CLIP(**open_clip_config(size, False)))
    path = tmp_path / "epoch_1.pt"
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": wrapped}, path)  # as open_clip's training writes it
    encoder = ours(size, path)
    assert encoder.info.activation == "gelu"  # nothing beside the file says it: open_clip's usual one
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sphinxkit"):
        report = encoders.load_weights(encoder, path)
    assert isinstance(report, LoadedWeights)
    assert (report.format, report.files, report.activation) == ("open_clip", (path,), "gelu")
    vision = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.startswith("visual."))
    assert report.num_bytes == vision - model.state_dict()["visual.proj"].nbytes
    assert {"visual.proj", "logit_scale", "token_embedding.weight"} <= set(report.skipped)
    said, warned = [record.getMessage() for record in caplog.records]
    assert "encoder clip_vit_large_patch14: open_clip weights from" in said
    assert "epoch_1.pt" in said
    assert "activation gelu" in said
    assert "does not say which activation its weights were trained with; gelu is taken, as open_clip weights" in warned
    caplog.clear()
    assert ours(size, path, activation="quick_gelu").info.activation == "quick_gelu"
    assert caplog.records == []


def test_timms_openai_tag_is_quick_gelu_under_a_plain_name() -> None:
    from sphinxkit.encoders.formats.clip import is_natively_quick_gelu

    assert is_natively_quick_gelu("vit_large_patch14_clip_224", "openai")
    assert is_natively_quick_gelu("vit_large_patch14_clip_quickgelu_224", "anything")
    assert not is_natively_quick_gelu("vit_large_patch14_clip_224", "laion2b")
    assert not is_natively_quick_gelu("somebody_elses", "none")
