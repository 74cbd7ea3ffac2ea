from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.mixers import ChannelMixer, SequenceMixer
from sphinxkit.tilers import GridTiler
from sphinxkit.vision.tower import VisionBranch, VisionTower


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


def test_views_follow_each_other_between_their_tags() -> None:
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


class FakeStreams:
    """In place of ``torch.cuda``: writes down what happens on which stream, and in which order."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.made = 0
        self.running = self.named("main")

    def named(self, name: str):
        streams = self

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                streams.log.append(("wait", name, other.name))

        Stream.name = name
        return Stream()

    def Stream(self, device: torch.device):
        self.made += 1
        return self.named(f"side {self.made}")

    def current_stream(self, device: torch.device):
        return self.running

    @contextmanager
    def stream(self, stream):
        before, self.running = self.running, stream
        yield
        self.running = before


class Elsewhere(torch.Tensor):
    """On a CPU, but says that it is on CUDA."""

    device = torch.device("cuda", 0)


def test_streams_wait_for_each_other_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeStreams()

    class Logging(CountingEncoder):
        def forward(self, pixels: Tensor) -> VisionFeatures:
            fake.log.append(("run", fake.running.name))
            return super().forward(pixels)

    def record_stream(self: Tensor, stream) -> None:
        fake.log.append(("keep", stream.name, tuple(self.shape)))

    first = VisionBranch([Logging(), Logging()], nn.Linear(2, 1), ChannelMixer([1, 1], tile_pool=2))
    built = tower(GridTiler(2, 2, 4), first, VisionBranch([Logging()], nn.Identity()))
    with torch.no_grad():
        expected = built(blocks(2))
        fake.log.clear()
        built.use_streams()
        assert torch.equal(built(blocks(2)), expected)  # on a CPU: one after the other
        assert fake.log == [("run", "main")] * 3
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        monkeypatch.setattr(Tensor, "record_stream", record_stream)
        views, shapes = (2, 5, 3, 4, 4), [(10, 1, 1), (10, 4, 1)]
        for _ in range(2):
            fake.log.clear()
            assert torch.equal(built(blocks(2).as_subclass(Elsewhere)).as_subclass(Tensor), expected)
            assert fake.log == [
                *[
                    line
                    for side in ("side 1", "side 2", "side 3")
                    for line in (
                        ("wait", side, "main"),
                        ("run", side),
                        ("keep", side, views),
                        *(("keep", "main", shape) for shape in shapes),
                    )
                ],
                *[("wait", "main", side) for side in ("side 1", "side 2", "side 3")],
            ]
        assert fake.made == 3  # they are kept
    fake.log.clear()
    built(blocks(2).as_subclass(Elsewhere))  # gradients are recorded
    assert fake.log == [("run", "main")] * 3
    copy.deepcopy(built)
    built.use_streams(False)


@pytest.mark.gpu
def test_streams_give_the_same_on_a_gpu() -> None:
    import sphinxkit

    model = sphinxkit.build("sphinx_micro", device="cpu", dtype=torch.float32)
    tower = model.require_vision().cuda()
    side = tower.image_size
    for batch in (1, 4):
        pixels = torch.randn(batch, 3, side, side, device="cuda")
        with torch.no_grad():
            tower.use_streams(False)
            expected = tower(pixels)
            tower.use_streams()
            for _ in range(5):
                assert torch.equal(tower(pixels), expected)


def test_a_cpu_takes_large_views_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CountingEncoder()
    built = tower(GridTiler(2, 2, 4), VisionBranch([encoder], nn.Identity()))
    expected = built(blocks(2))
    monkeypatch.setattr("sphinxkit.vision.tower.CPU_PIXELS", 3 * 4 * 4)
    assert torch.equal(built(blocks(2), max_views=7), expected)
    assert torch.equal(built(blocks(2), max_views=2), expected)
    assert torch.equal(built(blocks(2)), expected)
    monkeypatch.setattr("sphinxkit.vision.tower.CPU_PIXELS", 1)
    assert torch.equal(built(blocks(2), max_views=7), expected)
    assert [shape[0] for shape in encoder.seen] == [10, 3, 3, 3, 1, 2, 2, 2, 2, 2, 10, *[1] * 10]


def test_errors() -> None:
    with pytest.raises(ShapeError, match="2 encoders need a mixer"):
        VisionBranch([CountingEncoder(), CountingEncoder()], nn.Identity())
    with pytest.raises(ShapeError, match="1 encoders but 2 tile sizes"):
        VisionBranch([CountingEncoder()], nn.Identity(), tile_sizes=[None, 2])
    built = tower(GridTiler(2, 2, 4), VisionBranch([CountingEncoder()], nn.Identity()))
    with pytest.raises(ShapeError, match="expected pixels of 8x8, got 8x4"):
        built(torch.zeros(1, 3, 8, 4))
    with pytest.raises(ShapeError, match="expected floating pixels"):
        built(torch.zeros(3, 8, 8))
