from __future__ import annotations

import pytest
import torch

from sphinxkit.encoders.positions import grid_side, resample_positions
from sphinxkit.errors import ShapeError


def test_antialiasing_matters_where_the_table_shrinks() -> None:
    positions = torch.randn(1, 1 + 36, 3, generator=torch.Generator().manual_seed(0))
    plain = resample_positions(positions, 3, antialias=False)
    smooth = resample_positions(positions, 3, antialias=True)
    assert plain.shape == smooth.shape == (1, 10, 3)
    assert (plain - smooth).abs().max() > 0.1


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 12])
def test_no_square_grid(num_tokens: int) -> None:
    with pytest.raises(
        ShapeError, match=f"here: expected positions of a class token and a square grid, got {num_tokens}"
    ):
        grid_side(num_tokens, "here")


def test_square_grids() -> None:
    assert [grid_side(n, "here") for n in (2, 5, 257)] == [1, 2, 16]
