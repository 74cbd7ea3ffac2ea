from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sphinxkit.errors import ShapeError
from sphinxkit.llama.checks import MAX_LAYERS, check_capacity, check_inputs, check_sizes

SIZES = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": None, "num_layers": 2}
MODEL = SimpleNamespace(embed_dim=8, num_layers=2, head_dim=4, max_seq_len=6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"num_layers": MAX_LAYERS + 1}, "num_layers may be 256 at most, got 257"),
        ({"num_heads": 5}, "embed_dim 32 cannot be divided among num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"embed_dim": 36}, r"even head width, got 9 \(embed_dim 36 / num_heads 4\)"),
        ({"head_dim": 7}, r"even head width, got 7 \(head_dim\)"),
    ],
)
def test_sizes(sizes: dict[str, Any], message: str) -> None:
    check_sizes(**SIZES | {"num_layers": MAX_LAYERS})
    check_sizes(**SIZES | {"num_heads": 6, "head_dim": 8})  # heads of their own width need not divide it
    with pytest.raises(ShapeError, match=message):
        check_sizes(**SIZES | sizes)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 9), {}, r"expected embeds \(B, S, 8\) with S at least 1, got \(1, 2, 9\)"),
        ((1, 0, 8), {}, r"S at least 1, got \(1, 0, 8\)"),
        ((1, 7, 8), {}, "a sequence of 7 tokens is longer than max_seq_len 6"),
        ((1, 2, 8), {"lengths": [2]}, "lengths says what a cache is to keep, but no cache was given"),
        ((2, 2, 8), {"seq_lens": [2]}, "come as one row, got 2 rows"),
        ((1, 3, 8), {"seq_lens": [3, 0]}, r"sum to the 3 tokens given, got \[3, 0\] with sum 3"),
        ((1, 3, 8), {"seq_lens": [1, 1]}, r"got \[1, 1\] with sum 2"),
        ((2, 3, 8), {"output_positions": torch.tensor([0])}, r"must be \(2,\) or \(2, R\), got \(1,\)"),
        ((1, 3, 8), {"output_positions": torch.tensor([[-3, 3, -4]])}, r"\[3, -4\] lie outside of the 3 positions"),
    ],
)
def test_inputs(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    none = dict.fromkeys(("cache", "lengths", "seq_lens", "output_positions"))
    check_inputs(MODEL, torch.zeros(1, 9, 8), **none | {"seq_lens": [6, 3]})  # each sample fits
    with pytest.raises(ShapeError, match=message):
        check_inputs(MODEL, torch.zeros(shape), **none | options)


def test_capacity() -> None:
    check_capacity(MODEL, 6)
    with pytest.raises(ShapeError, match="a cache of 7 tokens was asked for, but the model's max_seq_len is 6"):
        check_capacity(MODEL, 7)
