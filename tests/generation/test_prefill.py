from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.generation import prefill_groups


def cost(groups: list[list[int]], lengths: list[int], cost_of_pass: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + cost_of_pass for group in groups)


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for tail in partitions([row for row in rest if row not in others]):
                yield [[first, *others], *tail]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 40))
def test_no_division_is_cheaper(lengths: list[int], cost_of_pass: int) -> None:
    groups = prefill_groups(lengths, cost_of_pass)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    best = min(cost(division, lengths, cost_of_pass) for division in partitions(list(range(len(lengths)))))
    assert cost(groups, lengths, cost_of_pass) == best


def test_a_pass_stays_within_its_limit() -> None:
    assert prefill_groups([10] * 5, 100, max_pass_tokens=20) in (
        [[0, 1], [2, 3], [4]],
        [[0, 1], [2], [3, 4]],
        [[0], [1, 2], [3, 4]],
    )
    assert prefill_groups([50, 10], 100, max_pass_tokens=20) == [[0], [1]]


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        ([1455, 30, 1460, 25, 28, 1440], 1.01),  # images and text: two passes, padded together it is twice the work
        ([1455, 700, 350, 170, 80, 40], 1.02),
        ([64] * 8, 1.0),
    ],
)
def test_little_is_padded(lengths: list[int], most: float) -> None:
    groups = prefill_groups(lengths, 9)
    read = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    assert read <= most * sum(lengths)


def test_the_decoder_reads_no_more_than_that(tokenizer, decode) -> None:
    lengths = [90, 5, 6, 88, 5]
    decoder, llm = decode([tokenizer.encode("It is")] * 5, lengths, max_new_tokens=3)
    assert [answer.text for answer in decoder.run()] == ["It is"] * 5
    assert [size for size, width in llm.passes if width > 1] == [2, 3]
    assert llm.num_prompt_tokens == 2 * 90 + 3 * 6  # padded together: 450
