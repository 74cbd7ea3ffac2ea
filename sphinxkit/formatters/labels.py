"""Which tokens are learnt: labels are aligned to the tokens, and a label is the target of the token before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not learnt: the default ``ignore_index`` of torch's cross entropy."""


def next_token_targets(labels: Tensor, seq_lens: Sequence[int] | None = None) -> Tensor:
    """What each position is to predict: the next token's label.

    Args:
        labels: Aligned to the tokens; ``IGNORE_INDEX`` where nothing is learnt.
        seq_lens: Lengths of the samples packed into the single row: the first token of a sample does not continue the
            sample before it, so it is never a target.
    Shape:
        labels: (B, S)
        return: (B, S - 1)
    """
    targets = labels[:, 1:]
    if seq_lens is None or len(seq_lens) < 2:
        return targets
    last = labels.new_tensor([end - 1 for end in accumulate(seq_lens[:-1])])
    return targets.index_fill(1, last, IGNORE_INDEX)
