from __future__ import annotations

import torch

from sphinxkit.tensor_files.low_rank import add_update, lora_scale


def test_scale() -> None:
    assert lora_scale(4, 6.0) == 1.5


def test_by_hand_with_rank_two() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    down, up = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    assert add_update(weight, down, up, 0.5).tolist() == [[1.5, 3.0, 2.5], [4.0, 4.0, 6.0]]


def test_sixteen_bit_is_rounded_once() -> None:
    # 1 + 2^-9 + 2^-9 is 1 + 2^-8 in float32, which bfloat16 (8 bits) rounds to even: 1; each product alone is exact
    weight, one = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(2, 1, dtype=torch.bfloat16)
    up = torch.full((1, 2), 2.0**-9, dtype=torch.bfloat16)
    assert add_update(weight, one, up, 1.0).item() == 1.0
    assert add_update(weight, one, up, 3.0).item() == 1.015625  # 1 + 3 * 2^-8 lies halfway and goes to the even
    assert add_update(weight, one, up, 3.0).dtype == torch.bfloat16
