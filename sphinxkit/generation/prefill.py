"""Which prompts are read together: rows of a forward pass are padded to the longest of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# The fixed cost of a forward pass (reading the weights), in tokens' worth of arithmetic: the ratio of the
# matmul rate to the memory's bandwidth, times bytes per weight over FLOPs per weight and token. Measured: 636 GFLOP/s
# to 70 GB/s on two cores with bf16, about 9; data sheet of an H200: 990 TFLOP/s to 4.8 TB/s, about 200.
PASS_COST = {"cpu": 9}
PASS_COST_ELSEWHERE = 200
# Positions of one pass, padding included: bounds the activations. Our choice.
MAX_PASS_TOKENS = 16_384


def pass_cost(device: torch.device) -> int:
    """What a forward pass costs beside its tokens, in tokens."""
    return PASS_COST.get(device.type, PASS_COST_ELSEWHERE)


def prefill_groups(
    lengths: Sequence[int], cost_of_pass: int, max_pass_tokens: int = MAX_PASS_TOKENS
) -> list[list[int]]:
    """Divide rows into forward passes so that padding and passes together cost least.

    The cost of a pass is its rows times the longest of them, plus ``cost_of_pass``. An optimal division is one of
    neighbours in the order of length, found by dynamic programming.

    Args:
        lengths: Tokens of each row.
        cost_of_pass: What one more pass costs, in tokens.
        max_pass_tokens: Positions that a pass of several rows may have, padding included.

    Returns:
        The row numbers of each pass, ascending.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        costs = [
            (best[start] + (end - start) * lengths[order[start]] + cost_of_pass, start)
            for start in range(end)
            if end - start == 1 or (end - start) * lengths[order[start]] <= max_pass_tokens
        ]
        cost, start = min(costs)
        best.append(cost)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]
