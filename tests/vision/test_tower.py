from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.mixers import ChannelMixer, SequenceMixer
from sphinxkit.tilers import GridTiler
from sphinxkit.vision import VisionBranch, VisionTower


class CountingEncoder(nn.Module):
    """Tokens that tell which view they come from: the view's mean, plus the place in the grid."""

    embed_dim, num_prefix_tokens, grid_size = 1, 1, (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, pixels: Tensor) -> VisionFeatures:
        self.seen.append(tuple(pixels.shape))
        mean = pixels.mean((1, 2, 3))[:, None, None]
        return VisionFeatures(mean + 0.5, mean + torch.arange(4.0)[None, :, None] / 10, (2, 2))


def tower(tiler: GridTiler, *branches: VisionBranch) -> VisionTower:
    built = VisionTower(branches, SequenceMixer(), embed_dim=1, image_size=tiler.image_size[0], tiler=tiler)
    nn.init.constant_(built.start_token, -1.0)
    nn.init.constant_(built.end_token, -2.0)
    return built


def blocks(batch: int) -> Tensor:
    """Images of 2x2 blocks of 4 pixels, whose values are 10 * image + 1, 2, 3, 4 row by row."""
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return (block + 10 * torch.arange(batch).view(-1, 1, 1, 1)).expand(batch, 3, 8, 8)


def test_views_follow_each_other_between_image_delimiters() -> None:
    built = tower(GridTiler(2, 2, 4), VisionBranch([CountingEncoder()], nn.Identity()))
    tokens = built(blocks(2))
    assert tokens.shape == (2, 5 * 7, 1)
    assert built.num_tokens == 35
    views = tokens.view(2, 5, 7)
    assert (views[:, :, 0] == -1).all()
    assert (views[:, :, -1] == -2).all()
    torch.testing.assert_close(views[:, 1:, 1], blocks(2)[:, 0, ::4, ::4].flatten(1) + 0.5)
    torch.testing.assert_close(views[0, 3, 2:6], 3.0 + torch.arange(4.0) / 10)


def test_branches_are_joined_view_by_view() -> None:
    class Negative(CountingEncoder):
        grid_size = (0, 0)

        def forward(self, pixels: Tensor) -> VisionFeatures:
            features = super().forward(pixels)
            return VisionFeatures(-features.prefix, features.patches[:, :0], (0, 0))

    first = VisionBranch([Negative()], nn.Identity())
    built = tower(GridTiler(2, 2, 4), first, VisionBranch([CountingEncoder()], nn.Identity()))
    views = built(blocks(1)).view(5, 8)
    assert (views[1:, 1] == -views[1:, 2]).all()


def test_pooled_tiles_have_fewer_tokens_than_the_thumbnail() -> None:
    mixer = ChannelMixer([1], tile_pool=2)
    encoder = CountingEncoder()
    built = tower(GridTiler(2, 2, 4), VisionBranch([encoder], nn.Identity(), mixer))
    tokens = built(blocks(1))
    assert built.num_tokens == tokens.shape[1] == (5 + 2) + 4 * (2 + 2)
    assert len(encoder.seen) == 1  # all views in one batch
    crops = tokens[0, 7:].view(4, 4)
    torch.testing.assert_close(crops[:, 2], torch.arange(1.0, 5.0) + 0.15)  # mean of 0, .1, .2, .3


def test_without_a_thumbnail_every_view_is_pooled() -> None:
    mixer = ChannelMixer([1], tile_pool=2)
    tiler = GridTiler(2, 2, 4, thumbnail=False)
    built = tower(tiler, VisionBranch([CountingEncoder()], nn.Identity(), mixer))
    assert built(blocks(1)).shape[1] == built.num_tokens == 4 * 4


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


def test_num_tokens_runs_nothing() -> None:
    def fail(*args: object) -> None:
        raise AssertionError("something ran")

    branch = VisionBranch([CountingEncoder()], nn.Identity(), ChannelMixer([1], tile_pool=2))
    built = tower(GridTiler(2, 2, 4), branch)
    for module in built.modules():
        module.register_forward_pre_hook(fail)
    assert built.num_tokens == (5 + 2) + 4 * (2 + 2)


def test_errors() -> None:
    with pytest.raises(ShapeError, match="2 encoders need a mixer"):
        VisionBranch([CountingEncoder(), CountingEncoder()], nn.Identity())
    with pytest.raises(ShapeError, match="1 encoders but 2 tile sizes"):
        VisionBranch([CountingEncoder()], nn.Identity(), tile_sizes=[None, 2])
    with pytest.raises(ShapeError, match=r"the mixer Identity has no method num_tokens\(prefix_counts, grids"):
        VisionBranch([CountingEncoder()], nn.Identity(), nn.Identity())
    built = tower(GridTiler(2, 2, 4), VisionBranch([CountingEncoder()], nn.Identity()))
    with pytest.raises(ShapeError, match=r"the mixer Identity has no method num_tokens\(counts\)"):
        VisionTower(built.branches, nn.Identity(), embed_dim=1, image_size=8, tiler=built.tiler)
    with pytest.raises(ShapeError, match="max_views must be at least 1, or None; got 0"):
        built(blocks(1), max_views=0)
    with pytest.raises(ShapeError, match="expected pixels of 8x8, got 8x4"):
        built(torch.zeros(1, 3, 8, 4))
    with pytest.raises(ShapeError, match="expected floating pixels"):
        built(torch.zeros(3, 8, 8))
