from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit import mixers
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.mixers import ChannelMixer

ROUNDING = 1e-6  # float32 means of values near 1


def features(width: int, grid: tuple[int, int], prefix: int = 1, batch: int = 2, seed: int = 0) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    return VisionFeatures(
        torch.randn(batch, prefix, width, generator=generator),
        torch.randn(batch, grid[0] * grid[1], width, generator=generator),
        grid,
    )


def test_sphinx_order_and_repetition() -> None:
    clip, convnext, dino = features(4, (16, 16)), features(6, (8, 8), seed=1), features(3, (16, 16), seed=2)
    mixer = ChannelMixer((4, 6, 3), grid=(16, 16))
    mixed = mixer([clip, convnext, dino])
    assert mixer.embed_dim == mixed.embed_dim == 13
    assert mixed.grid == (16, 16)
    assert torch.equal(mixed.prefix, torch.cat([clip.prefix, convnext.prefix, dino.prefix], dim=2))
    assert torch.equal(mixed.patches[..., :4], clip.patches)
    assert torch.equal(mixed.patches[..., 10:], dino.patches)
    for row, column in ((0, 0), (3, 14), (15, 15)):
        at = mixed.patches[:, row * 16 + column, 4:10]
        assert torch.equal(at, convnext.patches[:, (row // 2) * 8 + column // 2])


@pytest.mark.parametrize("name", ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light"])
def test_concatenation_equals_the_public_implementation(golden, name: str) -> None:
    from safetensors import safe_open

    with safe_open(golden / name / "golden.safetensors", "pt") as tensors:
        expected = tensors.get_tensor("enc.concat.view0")
        found = [key for key in ("clip", "convnext", "dinov2") if f"enc.{key}_tokens" in tensors.keys()]  # noqa: SIM118
        tokens = {key: tensors.get_tensor(f"enc.{key}_tokens")[:1] for key in found}
        assert len(tokens) == (2 if "light" in name else 3)
        tokens["convnext"] = None
        convnext_map = tensors.get_tensor("enc.convnext_map.view0")
    parts = []
    for key, rows in tokens.items():
        if key == "convnext":
            patches = convnext_map.flatten(2).transpose(1, 2)
            parts.append(VisionFeatures(patches.mean(1, keepdim=True), patches, tuple(convnext_map.shape[2:])))
        else:
            parts.append(VisionFeatures(rows[:, :1], rows[:, 1:], (16, 16)))
    mixed = ChannelMixer([part.embed_dim for part in parts], grid=(16, 16))(parts).tokens()
    # patches are copies; the ConvNeXt mean is over 64 cells here and over 256 repeated ones there
    assert torch.equal(mixed[:, 1:], expected[:, 1:])
    torch.testing.assert_close(mixed[:, :1], expected[:, :1], atol=ROUNDING, rtol=0)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_mixing_one_encoder_is_the_identity(width: int, height: int, across: int, prefix: int, explicit: bool) -> None:
    single = features(width, (height, across), prefix)
    mixed = ChannelMixer([width], grid=(height, across) if explicit else None)([single], is_tile=True)
    assert torch.equal(mixed.tokens(), single.tokens())
    assert mixed.grid == single.grid


def test_no_grid_keeps_the_common_one() -> None:
    mixed = ChannelMixer((2, 3))([features(2, (5, 7)), features(3, (5, 7))])
    assert mixed.grid == (5, 7)


def test_bilinear_resampling_is_used_when_asked_for() -> None:
    flat = VisionFeatures(torch.zeros(1, 1, 1), torch.tensor([[[1.0], [3.0]]]), (1, 2))
    mixed = ChannelMixer([1], grid=(1, 4), resample="bilinear")([flat])
    torch.testing.assert_close(mixed.patches.flatten(), torch.tensor([1.0, 1.5, 2.5, 3.0]), atol=ROUNDING, rtol=0)


def test_only_tiles_are_pooled_and_keep_their_prefix() -> None:
    parts = [features(2, (4, 4)), features(3, (2, 2), seed=3)]
    mixer = ChannelMixer((2, 3), grid=(4, 4), tile_pool=2)
    whole, crops = mixer(parts), mixer(parts, is_tile=True)
    assert (whole.grid, whole.num_tokens) == ((4, 4), 17)
    assert (crops.grid, crops.num_tokens) == ((2, 2), 5)
    assert torch.equal(whole.prefix, crops.prefix)
    first = whole.patches[:, [0, 1, 4, 5]].double().mean(dim=1)
    torch.testing.assert_close(crops.patches[:, 0].double(), first, atol=ROUNDING, rtol=0)


def test_prefix_modes() -> None:
    none, one, five = features(2, (2, 2), 0), features(3, (2, 2), 1, seed=1), features(4, (2, 2), 5, seed=2)
    widths = (2, 3, 4)
    parts = [none, one, five]
    assert ChannelMixer(widths, prefix="drop")(parts).prefix.shape == (2, 0, 9)
    first = ChannelMixer(widths, prefix="first")(parts).prefix
    mean = ChannelMixer(widths, prefix="mean")(parts).prefix
    assert first.shape == mean.shape == (2, 1, 9)
    torch.testing.assert_close(first[:, 0, :2], none.patches.mean(1), atol=ROUNDING, rtol=0)
    assert torch.equal(first[:, 0, 2:5], one.prefix[:, 0])
    assert torch.equal(first[:, 0, 5:], five.prefix[:, 0])
    torch.testing.assert_close(mean[:, 0, 5:], five.prefix.mean(1), atol=ROUNDING, rtol=0)
    with pytest.raises(ShapeError, match=r"\[0, 1, 5\] prefix tokens; say what to do with prefix='first'"):
        ChannelMixer(widths)(parts)


def test_wrong_features_are_named() -> None:
    mixer = ChannelMixer((4, 6))
    with pytest.raises(ShapeError, match=r"expected 2 features of widths \(4, 6\), got 2 of widths \(4, 5\)"):
        mixer([features(4, (2, 2)), features(5, (2, 2))])
    with pytest.raises(ShapeError, match=r"expected 2 features of widths \(4, 6\), got 1 of widths \(4,\)"):
        mixer([features(4, (2, 2))])
    with pytest.raises(ShapeError, match=r"differ in batch size: \[2, 3\]"):
        mixer([features(4, (2, 2)), features(6, (2, 2), batch=3)])
    with pytest.raises(ShapeError, match=r"on the grids \[\(2, 2\), \(4, 4\)\]; give grid=\(H, W\)"):
        mixer([features(4, (2, 2)), features(6, (4, 4))])
    with pytest.raises(ShapeError, match=r"feature 1 has no patches \(grid \(0, 0\)\)"):
        mixer([features(4, (2, 2)), features(6, (0, 0), prefix=32)])


def test_wrong_options_are_named() -> None:
    with pytest.raises(ShapeError, match=r"at least one positive width, got embed_dims=\(\)"):
        ChannelMixer(())
    with pytest.raises(ShapeError, match=r"grid must be a pair .* at least 1, got \(0, 4\)"):
        ChannelMixer((4,), grid=(0, 4))
    with pytest.raises(ShapeError, match=r"tile_pool=2 does not divide the grid \(3, 4\)"):
        ChannelMixer((4,), grid=(3, 4), tile_pool=2)
    with pytest.raises(ShapeError, match="tile_pool=0 does not divide"):
        ChannelMixer((4,), tile_pool=0)
    with pytest.raises(RegistryError, match=r"unknown resample 'bilinaer'; did you mean 'bilinear'\?"):
        ChannelMixer((4,), resample="bilinaer")  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match=r"unknown prefix 'pad'\. Known: error, first, mean, drop"):
        ChannelMixer((4,), prefix="pad")  # type: ignore[arg-type]


def test_registered() -> None:
    mixer = mixers.create("channel", embed_dims=[4], grid=(2, 2))
    assert isinstance(mixer, ChannelMixer)
    assert "grid=(2, 2)" in repr(mixer)
    assert mixers.names() == ["channel", "sequence"]


@given(
    st.sampled_from(["error", "first", "mean", "drop"]),
    st.lists(st.integers(0, 2), min_size=2, max_size=2),
    st.booleans(),
)
def test_num_tokens_is_what_comes_out(prefix: str, counts: list[int], is_tile: bool) -> None:
    grids = [(2, 4), (4, 2)]
    mixer = ChannelMixer([3, 2], grid=(2, 6), prefix=prefix, tile_pool=2)
    given_features = [features(width, grid, count) for width, grid, count in zip((3, 2), grids, counts, strict=True)]
    if prefix == "error" and counts[0] != counts[1]:
        for call in (lambda: mixer(given_features), lambda: mixer.num_tokens(counts, grids)):
            with pytest.raises(ShapeError, match=r"features have \[\d, \d\] prefix tokens"):
                call()
        return
    mixed = mixer(given_features, is_tile=is_tile)
    assert mixer.num_tokens(counts, grids, is_tile=is_tile) == mixed.num_tokens


@pytest.mark.parametrize(("height", "width", "pool"), [(4, 6, 2), (6, 3, 3)])
def test_pooling_halves_height_and_width_each_on_its_own(height: int, width: int, pool: int) -> None:
    numbers = torch.arange(height * width, dtype=torch.float32)
    patches = numbers.view(1, -1, 1).repeat(1, 1, 3)
    mixer = ChannelMixer([3], grid=(height, width), tile_pool=pool)
    mixed = mixer([VisionFeatures(torch.zeros(1, 1, 3), patches, (height, width))], is_tile=True)
    expected = numbers.view(height // pool, pool, width // pool, pool).mean(dim=(1, 3)).flatten()
    assert mixed.grid == (height // pool, width // pool)
    torch.testing.assert_close(mixed.patches[0, :, 0], expected, atol=0, rtol=0)


def test_a_grid_cannot_cost_gigabytes() -> None:
    assert ChannelMixer([3], grid=(256, 256)).grid == (256, 256)
    with pytest.raises(ShapeError, match=r"grid sides may be 256 patches at most, got \(16, 1000000000\)"):
        ChannelMixer([3], grid=(16, 10**9))


@pytest.mark.parametrize("grid", [16, (16,), (16, 16.0), "16", (0, 4), (True, 2)])
def test_a_grid_is_a_pair(grid: object) -> None:
    with pytest.raises(ShapeError, match=r"channel mixer: grid must be a pair \(H, W\)"):
        ChannelMixer([3], grid=grid)
