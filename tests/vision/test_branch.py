from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.mixers import ChannelMixer
from sphinxkit.tilers import GridTiler
from sphinxkit.vision import VisionBranch
from tests.vision.towers import CountingEncoder, blocks, tower


def test_each_encoder_sees_its_own_tile_size_and_shared_views_are_made_once() -> None:
    encoders = [CountingEncoder(), CountingEncoder(), CountingEncoder()]
    mixer = ChannelMixer([1, 1, 1])
    calls: list[int | None] = []

    class Spy(GridTiler):
        def tile(self, pixels: Tensor, tile_size: int | None = None) -> Tensor:
            calls.append(tile_size)
            return super().tile(pixels, tile_size)

    tiler = Spy(2, 2, 4)
    branch = VisionBranch(encoders, nn.Linear(3, 1), mixer, [None, 2, None])
    tower(tiler, branch)(blocks(1))
    assert [encoder.seen[0][-1] for encoder in encoders] == [4, 2, 4]
    assert sorted(calls, key=str) == [2, None]


def test_a_cpu_takes_large_views_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CountingEncoder()
    built = tower(GridTiler(2, 2, 4), VisionBranch([encoder], nn.Identity()))
    expected = built(blocks(2))
    monkeypatch.setattr("sphinxkit.vision.branch.CPU_PIXELS", 3 * 4 * 4)
    assert torch.equal(built(blocks(2), max_views=7), expected)
    assert torch.equal(built(blocks(2), max_views=2), expected)
    assert torch.equal(built(blocks(2)), expected)
    monkeypatch.setattr("sphinxkit.vision.branch.CPU_PIXELS", 1)
    assert torch.equal(built(blocks(2), max_views=7), expected)
    assert [shape[0] for shape in encoder.seen] == [10, 3, 3, 3, 1, 2, 2, 2, 2, 2, 10, *[1] * 10]


class FirstTokens(nn.Module):
    """A projector that keeps the first tokens of a view."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, : self.kept]


def test_a_projector_that_changes_the_number_of_tokens_says_so() -> None:
    built = tower(GridTiler(2, 2, 4), VisionBranch([CountingEncoder()], FirstTokens(3)))
    with pytest.raises(ShapeError, match="3 tokens of a view came, num_tokens says 5"):
        built(blocks(1))

    class Honest(FirstTokens):
        def num_tokens(self, count: int) -> int:
            return min(count, self.kept)

    built = tower(GridTiler(2, 2, 4), VisionBranch([CountingEncoder()], Honest(3)))
    assert built(blocks(1)).shape[1] == built.num_tokens == 5 * (1 + 3 + 1)
