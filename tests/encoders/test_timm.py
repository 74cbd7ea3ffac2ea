from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import timm as timm_library
import torch
from torch import Tensor, nn

from sphinxkit.encoders import check_encoder, create, timm
from sphinxkit.encoders.timm import _facts
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.pixels import IMAGENET_MEAN, IMAGENET_STD

# float32 rounding: the same network on pixels whose statistics were exchanged in one order or the other.
ROUNDING_ATOL = 2e-5

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
# name, options, (embed_dim, prefix tokens, grid, input size)
KINDS: list[tuple[str, dict[str, Any], tuple[int, int, tuple[int, int], int]]] = [
    ("vit_tiny_patch16_224", {**SMALL_VIT, "input_size": 64}, (24, 1, (4, 4), 64)),
    ("vit_small_patch14_reg4_dinov2", {**SMALL_VIT, "input_size": 56}, (24, 5, (4, 4), 56)),
    ("deit_tiny_distilled_patch16_224", {**SMALL_VIT, "input_size": 48}, (24, 2, (3, 3), 48)),
    ("vit_base_patch16_siglip_224.webli", {**SMALL_VIT, "input_size": 64}, (24, 0, (4, 4), 64)),
    ("resnet18", {"input_size": 64}, (512, 1, (2, 2), 64)),
    ("convnext_atto", {"input_size": 96}, (320, 1, (3, 3), 96)),
    (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        (96, 1, (7, 7), 224),
    ),
]


@pytest.mark.parametrize(("model", "options", "facts"), KINDS, ids=[kind[0] for kind in KINDS])
def test_any_kind_of_backbone_conforms(model: str, options: dict[str, Any], facts: tuple[Any, ...]) -> None:
    encoder = timm(model, **options)
    assert (encoder.embed_dim, encoder.num_prefix_tokens, encoder.grid_size, encoder.input_size) == facts
    assert check_encoder(encoder, batch_size=2) == []
    config = timm_library.models.get_pretrained_cfg(model)
    assert (encoder.info.mean, encoder.info.std) == (config.mean, config.std)


def test_vit_tokens_are_timms(randomize: Callable[..., nn.Module], random_pixels: Callable[..., Tensor]) -> None:
    encoder = randomize(timm("vit_base_patch16_siglip_224", input_size=32, **SMALL_VIT))
    reference = timm_library.create_model(
        "vit_base_patch16_siglip_224", pretrained=False, num_classes=0, img_size=32, **SMALL_VIT
    ).eval()
    missing, unexpected = reference.load_state_dict(encoder.trunk.state_dict(), strict=False)
    assert all(name.startswith("attn_pool.") for name in missing)  # the pooling head is gone
    assert unexpected == []
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # what SigLIP was trained with
    assert {"mean": encoder.info.mean, "std": encoder.info.std} == half
    pixels = random_pixels(2, 32)
    with torch.no_grad():
        expected = reference.forward_features(encoder.prepare(pixels))
    features = encoder(pixels)
    assert features.prefix.shape == (2, 0, 24)
    torch.testing.assert_close(features.patches, expected, rtol=0, atol=ROUNDING_ATOL)


@pytest.mark.parametrize(
    ("model", "options", "channels_last"),
    [("resnet18", {"input_size": 64}, False), (KINDS[-1][0], KINDS[-1][1], True)],
)
def test_a_map_becomes_patches_and_their_mean(
    model: str, options: dict[str, Any], channels_last: bool, random_pixels: Callable[..., Tensor]
) -> None:
    encoder = timm(model, **options)
    pixels = random_pixels(2, encoder.input_size)
    features = encoder(pixels)
    with torch.no_grad():
        expected = encoder.trunk.forward_features(encoder.prepare(pixels))
    if not channels_last:
        expected = expected.permute(0, 2, 3, 1)
    height, width = features.grid
    assert torch.equal(features.patches.unflatten(1, (height, width)), expected)
    torch.testing.assert_close(features.prefix[:, 0], expected.mean((1, 2)), rtol=0, atol=ROUNDING_ATOL)


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    encoder = timm("resnet18", input_size=32)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    nn.Sequential(encoder).train()
    encoder(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_trainable() -> None:
    encoder = timm("vit_base_patch16_siglip_224", input_size=32, trainable=True, **SMALL_VIT)
    encoder(torch.randn(1, 3, 32, 32)).tokens().square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_builds_on_meta_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("a constructor touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.device("meta"):
        encoder = create("timm", model="vit_large_patch14_reg4_dinov2", input_size=224)
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert (encoder.embed_dim, encoder.num_prefix_tokens, encoder.grid_size) == (1024, 5, (16, 16))
    assert (encoder.info.mean, encoder.info.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert encoder.info.weights.startswith("hf://timm/vit_large_patch14_reg4_dinov2")


def test_unknown_models_and_options() -> None:
    with pytest.raises(RegistryError, match="timm has no such model; did you mean 'resnet18'"):
        timm("resnet81")
    with pytest.raises(RegistryError, match="hub ids are given as weights="):
        timm("hf-hub:timm/vit_tiny_patch16_224")
    with pytest.raises(RegistryError, match=r"timm 'resnet18.none': .*Invalid pretrained tag"):
        timm("resnet18.none")
    with pytest.raises(RegistryError, match="global_pool, pretrained cannot be set"):
        timm("resnet18", pretrained=True, global_pool="avg")
    with pytest.raises(RegistryError, match=r"timm refuses the options: .*no_such_option"):
        timm("resnet18", no_such_option=3)


def test_a_backbone_that_keeps_its_pooling_is_named() -> None:
    with pytest.raises(ShapeError, match="timm 'crossvit_9_240': timm cannot remove the pooling of this backbone"):
        timm("crossvit_9_240")


def test_unusable_backbones() -> None:
    with pytest.raises(ShapeError, match="the backbone does not take input_size 16"):
        _facts(timm("vit_tiny_patch16_224", input_size=32, **SMALL_VIT).trunk, "here", 16)

    class Odd(nn.Module):
        num_prefix_tokens = 1

        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.shape = shape

        def forward_features(self, pixels: Tensor) -> Tensor:
            return pixels.new_zeros(self.shape)

    with pytest.raises(
        ShapeError, match=r"expected features \(B, N, D\) or \(B, D, H, W\) from the backbone, got \(1, 8\)"
    ):
        _facts(Odd(1, 8), "here", 16)
    with pytest.raises(ShapeError, match="8 tokens less 1 prefix tokens are no square grid"):
        _facts(Odd(1, 8, 4), "here", 16)
