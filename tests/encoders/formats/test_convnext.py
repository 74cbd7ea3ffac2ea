"""CLIP ConvNeXts' published formats: upstream's module with random weights, saved by upstream's writer, read here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from sphinxkit import encoders
from sphinxkit.errors import CheckpointError
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD

# Tokens of order one to five through float32 convolutions in another order of sums.
TOKENS_ATOL = 1e-5

# (dims, depths): two widths, two depths
SIZES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((8, 8, 16, 24), (1, 1, 1, 1)),
    ((16, 24, 32, 40), (1, 2, 2, 1)),
]
SIDE = 64


def expected_tokens(trunk: Any, pixels: Tensor) -> Tensor:
    """The mean and every cell of timm's last map under its last norm."""
    with torch.no_grad():
        patches: Tensor = trunk.eval().head.norm(trunk.forward_features(pixels)).flatten(2).transpose(1, 2)
    return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


@pytest.mark.parametrize(("dims", "depths"), SIZES)
@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize(("model_name", "eps"), [("convnext_base", 1e-6), ("convnext_xxlarge", 1e-5)])
def test_open_clip(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    safetensors: bool,
    model_name: str,
    eps: float,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from open_clip import timm_model
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf

    class NoTokenizer:
        def save_pretrained(self, folder: Path) -> None:
            pass

    real = timm.create_model
    monkeypatch.setattr(
        timm_model.timm, "create_model", lambda name, **options: real(name, dims=dims, depths=depths, **options)
    )
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": model_name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": SIDE,
        },
        "text_cfg": {"context_length": 7, "vocab_size": 31, "width": 16, "heads": 2, "layers": 2},
    }
    model: Any = randomize(open_clip.CLIP(**config))
    set_model_preprocess_cfg(model, {"mean": CLIP_MEAN, "std": CLIP_STD})
    save_for_hf(model, NoTokenizer(), config, str(tmp_path), safe_serialization=safetensors)
    encoder = encoders.create(
        "convnext_xxlarge", weights=tmp_path, input_size=SIDE, dims=dims, depths=depths, norm_eps=eps
    )
    pixels = random_pixels(2, SIDE)
    expected = expected_tokens(model.visual.trunk, pixels)
    torch.testing.assert_close(encoder(pixels).tokens(), expected, rtol=0, atol=TOKENS_ATOL)


@pytest.mark.parametrize(("dims", "depths"), SIZES)
@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize(("model_name", "eps"), [("convnext_base.clip_laion2b", 1e-6), ("convnext_xxlarge", 1e-5)])
def test_timm(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    safetensors: bool,
    model_name: str,
    eps: float,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    model: Any = randomize(timm.create_model(model_name, dims=dims, depths=depths))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=safetensors)
    encoder = encoders.create(
        "convnext_xxlarge", weights=tmp_path, input_size=SIDE, dims=dims, depths=depths, norm_eps=eps
    )
    pixels = random_pixels(2, SIDE)
    torch.testing.assert_close(encoder(pixels).tokens(), expected_tokens(model, pixels), rtol=0, atol=TOKENS_ATOL)


def test_an_epsilon_that_shapes_do_not_show(tmp_path: Path) -> None:
    dims, depths = SIZES[0]
    model = timm.create_model("convnext_base", dims=dims, depths=depths)
    timm.models.save_for_hf(model, str(tmp_path))
    options: dict[str, Any] = {"input_size": SIDE, "dims": dims, "depths": depths}
    with pytest.raises(CheckpointError, match="norm_eps is 1e-06 in the files' configuration, 1e-05 in the encoder"):
        encoders.create("convnext_xxlarge", weights=tmp_path, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    config.setdefault("model_args", {})["norm_eps"] = 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert encoders.create("convnext_xxlarge", weights=tmp_path, **options).info.activation == "gelu"
