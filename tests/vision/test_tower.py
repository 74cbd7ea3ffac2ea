from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.mixers import ChannelMixer
from sphinxkit.tilers import GridTiler
from sphinxkit.vision import VisionBranch, VisionTower
from tests.vision.towers import CountingEncoder, blocks, tower


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
