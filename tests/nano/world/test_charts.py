from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from sphinxkit.nano.world import Rect, World
from sphinxkit.nano.world.charts import HIGHEST_VALUE, LEAST_BARS, MOST_BARS
from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.scene import Chart

NUM_CHARTS = 150


def text_rect(text: str, at: tuple[int, int], scale: int) -> Rect:
    height, width = text_mask(text, scale).shape
    return Rect(at[0], at[1], at[0] + width, at[1] + height)


def overlap(one: Rect, other: Rect) -> bool:
    return one.x1 < other.x2 and other.x1 < one.x2 and one.y1 < other.y2 and other.y1 < one.y2


def charts(size: int | tuple[int, int]) -> list[Chart]:
    found = []
    for split in ("train", "test"):
        for index in range(NUM_CHARTS // 2):
            chart = World("synthetic", split, size).scene_of_kind(index, "chart").chart
            assert chart is not None
            found.append(chart)
    return found


@pytest.mark.parametrize("size", [64, 80, 112, 128, (96, 64), (64, 128)])
def test_nothing_in_a_chart_overlaps_or_leaves_the_picture(size: int | tuple[int, int]) -> None:
    width, height = (size, size) if isinstance(size, int) else size
    counts = set()
    for chart in charts(size):
        counts.add((chart.is_horizontal, len(chart.bars)))
        texts = [
            text_rect(text, at, chart.scale)
            for bar in chart.bars
            for text, at in ((bar.label, bar.label_at), (str(bar.value), bar.value_at))
        ]
        parts = [*texts, *(bar.rect for bar in chart.bars)]
        assert all(0 <= r.x1 < r.x2 <= width and 0 <= r.y1 < r.y2 <= height for r in parts), chart
        assert not [pair for pair in combinations(parts, 2) if overlap(*pair)], chart
        if not chart.is_horizontal:  # a column between neighbours' labels, so that they are two words
            labels = sorted(text_rect(bar.label, bar.label_at, chart.scale) for bar in chart.bars)
            assert all(right.x1 > left.x2 for left, right in pairwise(labels)), chart
    assert {count for is_horizontal, count in counts if is_horizontal} == set(range(LEAST_BARS, MOST_BARS + 1))
    most = 3 if width == 64 else MOST_BARS - 1
    assert {count for is_horizontal, count in counts if not is_horizontal} == set(range(LEAST_BARS, most + 1))


@pytest.mark.parametrize("size", [64, 128])
def test_bars_are_as_long_as_their_values(size: int) -> None:
    for chart in charts(size):
        lengths = [bar.rect.width if chart.is_horizontal else bar.rect.height for bar in chart.bars]
        values = [bar.value for bar in chart.bars]
        assert len(set(values)) == len(values)
        assert len({bar.label for bar in chart.bars}) == len({bar.color for bar in chart.bars}) == len(values)
        unit = max(lengths) / max(values)
        # whole pixels: rounded down, the longest one too
        assert all(abs(length - value * unit) <= 1 + unit / 2 for length, value in zip(lengths, values, strict=True))
        assert max(values) <= HIGHEST_VALUE
