from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from sphinxkit import tilers
from sphinxkit.errors import ShapeError
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, renormalize, resize_pixels
from sphinxkit.tilers import GridTiler, preprocess

# torch's float16 interpolation rounds as recorded on x86 CPUs with AVX2 or AVX-512 only; others were not measured.
RECORDED_ROUNDING = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
OTHER_ROUNDING = 1e-2  # a float16 step or so of values below 4, elsewhere

TILERS = {
    "llama_ens": GridTiler(1, 1, 224, thumbnail=False),
    "llama_ens5": GridTiler(2, 2, 224),
    "llama_ens_light": GridTiler(1, 1, 512, thumbnail=False),
    "llama_ens5_light": GridTiler(2, 2, 512),
}


def sha256(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def same_as_recorded(views: torch.Tensor, hashes: list[str]) -> bool:
    return [sha256(view) for view in views] == hashes


def factored_imagenet(pixels: torch.Tensor) -> torch.Tensor:
    """ImageNet statistics with the two affine maps multiplied out: the light types' last bits."""
    clip_mean, clip_std, mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)
    )
    return pixels * (clip_std / std) + (clip_mean - mean) / std


@pytest.fixture(params=sorted(TILERS))
def recorded(request, golden: Path):
    name = request.param
    facts = json.loads((golden / name / "golden.json").read_text())
    pixels = preprocess(Image.open(golden / "images" / "square.png"), facts["image_size"])
    return name, facts["views"], pixels, load_file(golden / name / "golden.safetensors"), facts


def views_224(name: str, pixels: torch.Tensor) -> torch.Tensor:
    return TILERS[name].tile(pixels, 224 if "light" in name else None)[0]


def views_convnext(name: str, pixels: torch.Tensor) -> torch.Tensor:
    if "light" in name:
        return TILERS[name].tile(pixels, 512)[0]
    return resize_pixels(TILERS[name].tile(pixels)[0], (256, 256), "nearest")


@pytest.mark.skipif(not RECORDED_ROUNDING, reason="float16 interpolation rounds otherwise without AVX2")
def test_every_view_hashes_as_recorded(recorded) -> None:
    name, views, pixels, _, facts = recorded
    assert TILERS[name].num_views == views["n_encoder_views"]
    small = views_224(name, pixels)
    if "clip_in_sha256" in views:
        assert same_as_recorded(small, views["clip_in_sha256"])
    assert same_as_recorded(views_convnext(name, pixels), views["convnext_in_sha256"])
    if "view0_224_sha256_of_float32" in facts:
        assert sha256(small[0]) == facts["view0_224_sha256_of_float32"]
    if "light" in name:
        assert same_as_recorded(factored_imagenet(small), views["dinov2_in_sha256"])
    else:
        assert same_as_recorded(renormalize(small, IMAGENET_MEAN, IMAGENET_STD), views["dinov2_in_sha256"])


def test_views_match_the_stored_slices_on_any_machine(recorded) -> None:
    name, _, pixels, tensors, _ = recorded
    small, large = views_224(name, pixels)[0], views_convnext(name, pixels)[0]
    dinov2 = renormalize(small[None], IMAGENET_MEAN, IMAGENET_STD)[0]
    close = {"atol": OTHER_ROUNDING, "rtol": 0}
    torch.testing.assert_close(large[:, ::8, ::8], tensors["convnext_in.view0.strided"], **close)
    torch.testing.assert_close(dinov2[:, ::4, ::4], tensors["dinov2_in.view0.strided"], **close)
    if "view0_224.fp16.strided" in tensors:
        torch.testing.assert_close(small[:, ::2, ::2], tensors["view0_224.fp16.strided"].float(), **close)


def test_crops_are_the_raw_pixels_row_by_row() -> None:
    pixels = torch.randn(2, 3, 32, 48)
    tiler = GridTiler(2, 3, 16)
    views = tiler(pixels)
    assert views.shape == (2, 7, 3, 16, 16)
    assert torch.equal(views[:, 3], pixels[:, :, :16, 32:])
    assert torch.equal(views[:, 4], pixels[:, :, 16:, :16])
    assert torch.equal(views[:, 0], resize_pixels(pixels, (16, 16), "bicubic"))


def test_another_tile_size_cuts_from_the_resized_image() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    views = GridTiler(2, 2, 32).tile(pixels, 14)
    resized = resize_pixels(pixels, (28, 28), "bicubic")
    assert torch.equal(views[:, 0], resize_pixels(pixels, (14, 14), "bicubic"))
    assert torch.equal(views[:, 2], resized[:, :, :14, 14:])
    own = GridTiler(2, 2, 32).tile(pixels, 32)
    assert torch.equal(own[:, 1], pixels[:, :, :32, :32])


def test_the_single_view() -> None:
    pixels = torch.randn(2, 3, 16, 16)
    tiler = GridTiler(1, 1, 16, thumbnail=False)
    assert torch.equal(tiler(pixels), pixels[:, None])
    assert torch.equal(tiler.tile(pixels, 16)[:, 0], pixels.half().float())
    assert torch.equal(tiler.tile(pixels, 8)[:, 0], resize_pixels(pixels, (8, 8), "bicubic"))


def test_facts() -> None:
    assert GridTiler().image_size == (448, 448)
    assert GridTiler(2, 3, 10).image_size == (20, 30)
    assert (GridTiler().num_views, GridTiler(3, 3).num_views, GridTiler(2, 2, thumbnail=False).num_views) == (5, 10, 4)
    assert GridTiler().is_tile == (False, True, True, True, True)
    assert GridTiler(1, 2, thumbnail=False).is_tile == (True, True)
    assert GridTiler(1, 1, thumbnail=False).is_tile == (False,)
    assert isinstance(tilers.create("grid", rows=3), GridTiler)
    assert tilers.names() == ["grid"]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.integers(1, 3))
def test_untile_inverts_tile(rows: int, cols: int, side: int, thumbnail: bool, batch: int) -> None:
    tiler = GridTiler(rows, cols, side, thumbnail)
    pixels = torch.randn(batch, 3, *tiler.image_size)
    views = tiler(pixels)
    assert views.shape == (batch, tiler.num_views, 3, side, side)
    assert torch.equal(tiler.untile(views), pixels)


@pytest.mark.parametrize("tile_size", [None, 8, 5])
def test_rows_of_a_batch_do_not_mix(tile_size: int | None) -> None:
    tiler = GridTiler(2, 2, 8)
    pixels = torch.randn(3, 3, 16, 16)
    alone = torch.cat([tiler.tile(row[None], tile_size) for row in pixels])
    assert torch.equal(tiler.tile(pixels, tile_size), alone)


def test_refusals() -> None:
    for name in ("rows", "cols", "tile_size"):
        with pytest.raises(ShapeError, match=f"{name} must be an int of at least 1, got 0"):
            GridTiler(**{name: 0})
        with pytest.raises(ShapeError, match=f"{name} must be an int of at least 1, got 2.5"):
            GridTiler(**{name: 2.5})
    tiler = GridTiler(2, 2, 8)
    with pytest.raises(ShapeError, match=r"an image of 16x16 pixels \(2x2 tiles of 8\), got 16x8"):
        tiler(torch.zeros(1, 3, 16, 8))
    with pytest.raises(ShapeError, match="grid tiler: expected floating pixels"):
        tiler(torch.zeros(3, 16, 16))
    with pytest.raises(ShapeError, match="tile_size must be an int of at least 1, got 0"):
        tiler.tile(torch.zeros(1, 3, 16, 16), 0)
    with pytest.raises(ShapeError, match=r"expected views \(B, 5, C, h, w\), got \(1, 4, 3, 8, 8\)"):
        tiler.untile(torch.zeros(1, 4, 3, 8, 8))


@pytest.mark.gpu
def test_views_on_cuda_agree() -> None:
    pixels = torch.randn(1, 3, 64, 64).clamp(-2, 2)
    for tile_size in (None, 14):
        cpu, cuda = (GridTiler(2, 2, 32).tile(p, tile_size) for p in (pixels, pixels.cuda()))
        torch.testing.assert_close(cuda.cpu(), cpu, atol=OTHER_ROUNDING, rtol=0)
