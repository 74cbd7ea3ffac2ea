"""Groups prompts into prefill passes; the rows of a pass are padded to the longest."""

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
    """Fixed cost of a forward pass, in tokens."""
    return PASS_COST.get(device.type, PASS_COST_ELSEWHERE)


def prefill_groups(
    lengths: Sequence[int], cost_of_pass: int, max_pass_tokens: int = MAX_PASS_TOKENS
) -> list[list[int]]:
    """Group rows into forward passes with the least total cost of padding and passes.

    A pass costs its number of rows times its longest row, plus ``cost_of_pass``. The optimal groups are runs of rows
    sorted by length; dynamic programming finds them.

    Args:
        lengths: Length of each row in tokens.
        cost_of_pass: Fixed cost of a pass, in tokens.
        max_pass_tokens: Maximum positions in a pass of several rows, padding included.

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
