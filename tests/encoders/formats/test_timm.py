"""timm's own files into a timm encoder: saved by timm's writer, read here, through timm's filters where they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sphinxkit import encoders
from sphinxkit.errors import CheckpointError

# The same network with the same weights, on pixels whose statistics were changed in one order of sums.
TOKENS_ATOL = 1e-5

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
WIDE: dict[str, Any] = {"embed_dim": 48, "depth": 1, "num_heads": 4}
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("vit_base_patch16_siglip_224", SMALL, 32),  # no class token, pooling by attention
    ("vit_base_patch16_siglip_224", WIDE, 48),
    ("vit_small_patch16_dinov3", SMALL, 64),  # rotary positions, registers
    ("vit_small_patch14_reg4_dinov2", WIDE, 28),
    ("deit_tiny_distilled_patch16_224", SMALL, 32),  # two classifiers
    ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}, 224),
    ("convnext_atto", {}, 64),
    ("resnet18", {}, 64),
]


@pytest.mark.parametrize(("model", "options", "side"), KINDS, ids=[f"{kind[0]}-{kind[2]}" for kind in KINDS])
@pytest.mark.parametrize("safetensors", [False, True])
def test_timms_own_files(
    model: str,
    options: dict[str, Any],
    side: int,
    safetensors: bool,
    tmp_path: Path,
    randomize: Callable[..., nn.Module],
    random_pixels: Callable[..., Tensor],
) -> None:
    fixed = timm.models.get_pretrained_cfg(model).fixed_input_size
    upstream: Any = timm.create_model(model, **options, **({"img_size": side} if fixed else {}))
    randomize(upstream).eval()
    timm.models.save_for_hf(upstream, str(tmp_path), safe_serialization=safetensors)
    encoder = encoders.create("timm", weights=tmp_path, model=model, input_size=side, **options)
    pixels = random_pixels(2, side)
    with torch.no_grad():
        expected = upstream.forward_features(encoder.prepare(pixels))
        found = encoder.trunk.forward_features(encoder.prepare(pixels))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOKENS_ATOL)
    patches = encoder(pixels).patches
    assert patches.isfinite().all()


def test_an_older_layout_and_another_size_go_through_timms_filter(tmp_path: Path) -> None:
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    upstream: Any = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, **options)
    state = upstream.state_dict()
    # the project's layout, which timm's filter converts: a class position of its own, registers under another name
    state["pos_embed"] = torch.cat([torch.randn(1, 1, 24), state["pos_embed"]], dim=1)
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.randn(1, 24)
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = encoders.create("timm", model="vit_small_patch14_reg4_dinov2", input_size=28, **options)
    report = encoders.load_weights(encoder, tmp_path / "dinov2.pth")
    assert report.format == "timm"
    assert report.resampled == ("pos_embed from [1, 17, 24] to [1, 4, 24]",)
    found = encoder.state_dict()
    assert torch.equal(found["trunk.cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(found["trunk.reg_token"], state["register_tokens"])
    table = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, size=(2, 2), mode="bicubic", antialias=True)
    torch.testing.assert_close(found["trunk.pos_embed"], expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


def test_batch_norms_counters_come_too(tmp_path: Path) -> None:
    upstream = timm.create_model("resnet18")
    upstream(torch.randn(2, 3, 32, 32))  # running statistics move
    timm.models.save_for_hf(upstream, str(tmp_path))
    encoder = encoders.create("timm", weights=tmp_path, model="resnet18", input_size=32)
    state = encoder.state_dict()
    assert state["trunk.bn1.num_batches_tracked"] == 1
    assert torch.equal(state["trunk.bn1.running_mean"], upstream.bn1.running_mean)


def test_another_models_file(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("convnext_atto"), str(tmp_path))
    with pytest.raises(CheckpointError, match="does not fit encoder timm/resnet18") as caught:
        encoders.create("timm", weights=tmp_path, model="resnet18", input_size=32)
    assert "'trunk.conv1.weight' is missing in the files" in str(caught.value)
    assert "is in the files but not in the encoder" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("vit_so400m_patch14_siglip_384", "hf://timm/vit_so400m_patch14_siglip_384.webli"),
        ("vit_large_patch16_dinov3", "hf://timm/vit_large_patch16_dinov3.lvd1689m"),
        ("vit_base_patch16_clip_224.openai", "hf://timm/vit_base_patch16_clip_224.openai"),
    ],
)
def test_where_timms_tag_is(model: str, source: str) -> None:
    with torch.device("meta"):
        assert encoders.create("timm", model=model).info.weights == source


def test_a_tag_without_weights() -> None:
    encoder = encoders.create("timm", model="vit_giant_patch14_224.untrained", input_size=28, **SMALL)
    assert encoder.info.weights == ""
    with pytest.raises(CheckpointError, match="encoder timm/.*: no published weights are known for it"):
        encoders.load_weights(encoder, "pretrained")
