from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.mixers import pool_patches, resample_patches

ROUNDING = 1e-6  # float32 means and interpolation weights against float64 sums of values near 1


def test_nearest_repeats_tokens_as_sphinx_does_with_convnext() -> None:
    patches = torch.randn(2, 64, 3)
    maps = rearrange(patches, "b (h w) d -> b h w d", h=8)
    expected = maps.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).reshape(2, 256, 3)
    assert torch.equal(resample_patches(patches, (8, 8), (16, 16)), expected)


def test_nearest_between_uneven_grids_by_hand() -> None:
    patches = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]]])  # 2 x 3
    out = resample_patches(patches, (2, 3), (3, 2))
    # rows floor(i * 2 / 3) = 0 0 1, columns floor(j * 3 / 2) = 0 1
    assert out.flatten().tolist() == [0.0, 1.0, 0.0, 1.0, 10.0, 11.0]


@given(st.tuples(*[st.integers(1, 12)] * 4))
def test_nearest_follows_the_index_formula(sides: tuple[int, int, int, int]) -> None:
    h, w, out_h, out_w = sides
    patches = torch.arange(h * w, dtype=torch.float64).view(1, h * w, 1)
    out = resample_patches(patches, (h, w), (out_h, out_w)).view(out_h, out_w)
    for i in range(out_h):
        for j in range(out_w):
            assert out[i, j] == (i * h // out_h) * w + j * w // out_w


def test_bilinear_against_float64_by_hand() -> None:
    patches = torch.tensor([[[1.0], [3.0]]])  # 1 x 2, centres at 0.5 and 1.5
    out = resample_patches(patches, (1, 2), (1, 4), "bilinear")
    # sample positions 0.25 0.75 1.25 1.75 in input pixels, clamped at the ends
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5, 2.5, 3.0]), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_equal_grids_are_left_alone(mode: str) -> None:
    patches = torch.randn(1, 6, 2)
    assert resample_patches(patches, (2, 3), (2, 3), mode) is patches


def test_pooling_is_the_mean_of_blocks_and_the_bilinear_halving() -> None:
    patches = torch.randn(2, 16 * 16, 5)
    pooled = pool_patches(patches, (16, 16), 2)
    maps = patches.double().view(2, 16, 16, 5)
    oracle = (maps[:, ::2, ::2] + maps[:, 1::2, ::2] + maps[:, ::2, 1::2] + maps[:, 1::2, 1::2]) / 4
    torch.testing.assert_close(pooled.double(), oracle.reshape(2, 64, 5), atol=ROUNDING, rtol=0)
    halved = resample_patches(patches, (16, 16), (8, 8), "bilinear")
    torch.testing.assert_close(pooled, halved, atol=ROUNDING, rtol=0)


def test_pooling_by_one_changes_nothing() -> None:
    patches = torch.randn(1, 6, 2)
    assert pool_patches(patches, (2, 3), 1) is patches


def test_refusals() -> None:
    patches = torch.randn(1, 6, 2)
    with pytest.raises(RegistryError, match=r"unknown mode 'nearset'; did you mean 'nearest'\?"):
        resample_patches(patches, (2, 3), (4, 4), "nearset")
    with pytest.raises(ShapeError, match=r"resample_patches: grid must be a pair .* at least 1, got \(0, 0\)"):
        resample_patches(patches[:, :0], (0, 0), (4, 4))
    for call in (lambda: resample_patches(patches, 6, (4, 4)), lambda: resample_patches(patches, (2, 3), 16)):
        with pytest.raises(ShapeError, match=r"resample_patches: grid must be a pair \(H, W\) of ints .* got (6|16)"):
            call()
    with pytest.raises(ShapeError, match=r"pool_patches: grid must be a pair .* got 2"):
        pool_patches(patches, 2, 2)
    with pytest.raises(ShapeError, match=r"pool_patches: expected patches \(B, 4, D\) for a 2x2 grid"):
        pool_patches(patches, (2, 2), 2)
    with pytest.raises(ShapeError, match=r"expected patches \(B, 9, D\) for a 3x3 grid, got \(1, 6, 2\)"):
        resample_patches(patches, (3, 3), (4, 4))
    with pytest.raises(ShapeError, match="a 2x3 grid cannot be pooled in blocks of 2x2"):
        pool_patches(patches, (2, 3), 2)
