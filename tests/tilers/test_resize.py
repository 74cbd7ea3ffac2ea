from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.tilers import resize
from sphinxkit.tilers.preprocess import MAX_SIDE, MIN_IMAGE_SIZE, PAD_COLOR
from sphinxkit.tilers.resize import SUPPORT, Window, resize_window


@given(st.integers(1, MAX_SIDE), st.data(), st.sampled_from([224, 448, 672, 512, 1024, 384, 97, 8]))
def test_a_window_holds_every_result_that_sees_the_image(side: int, data: st.DataObject, size: int) -> None:
    length = data.draw(st.integers(1, side))
    offset = (side - length) // 2
    window = resize_window(side, offset, length, size)
    assert 0 <= window.first < window.last <= size
    assert 0 <= window.low <= offset
    assert offset + length <= window.high <= side
    scale = side / size
    reach = SUPPORT * max(scale, 1.0)
    for outside in (window.first - 1, window.last):  # plain padding below the whole filter
        if 0 <= outside < size:
            center = (outside + 0.5) * scale
            assert center + reach < offset or center - reach > offset + length
    for inside in (window.first, window.last - 1):  # every tap is at hand, or falls off the real edge, too
        center = (inside + 0.5) * scale
        assert window.low <= center - reach - 1 or window.low == 0
        assert center + reach + 1 <= window.high or window.high == side


def test_the_usual_photo_needs_about_its_share() -> None:
    assert resize_window(1920, 420, 1080, 448) == Window(91, 357, 379, 1541)
    assert resize_window(1024, 224, 576, 512).last < 512


def test_an_unpadded_axis_is_one_plain_pass() -> None:
    assert resize_window(640, 0, 640, 224) == Window(0, 224, 0, 640)


def test_odd_sizes_resize_the_whole_axis() -> None:
    assert resize_window(1000, 400, 200, 97) == Window(0, 97, 0, 1000)


def test_a_weight_on_the_edge_resizes_the_whole_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    resize_window.cache_clear()
    monkeypatch.setattr(resize, "_is_on_edge", lambda *_: True)
    assert resize_window(1920, 420, 1080, 448) == Window(0, 448, 0, 1920)
    assert resize_window(1920, 420, 1080, 512) != Window(0, 512, 0, 1920)  # positions are exact for powers of two
    resize_window.cache_clear()


def test_the_widest_filter_cannot_change_a_flat_colour() -> None:
    # each fixed-point weight is off by at most half a unit, and 2**21 units round to the next value
    taps = 2 * SUPPORT * MAX_SIDE / MIN_IMAGE_SIZE + 2
    assert taps * 0.5 * max(PAD_COLOR) < 2 ** (resize.PRECISION_BITS - 1)


def test_strips_give_the_same_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    image = Image.linear_gradient("L").resize((40, 300)).convert("RGB")
    whole, first = resize.resize_axis(image, 0, 300, 130, 64, PAD_COLOR)
    monkeypatch.setattr(resize, "STRIP", 7)
    strips, again = resize.resize_axis(image, 0, 300, 130, 64, PAD_COLOR)
    assert first == again
    assert whole.tobytes() == strips.tobytes()
