"""Labels for training. Labels are aligned to the tokens; each label is the target of the token before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not learnt: the default ``ignore_index`` of torch's cross entropy."""


def next_token_targets(labels: Tensor, seq_lens: Sequence[int] | None = None) -> Tensor:
    """Targets of each position: the next token's label.

    Args:
        labels: Aligned to the tokens; ``IGNORE_INDEX`` where there is no loss.
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


def label_spans(
    token_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    unk_id: int,
) -> list[int]:
    """Labels of a conversation: tokens whose first character is in an answer are in the loss.

    A token that begins before an answer belongs to the prompt; one that begins inside and ends after it belongs to the
    answer. Labels use the tokenizer's character offsets. Searching for the answer's tokens would fail when the question
    contains the answer's words.

    Args:
        token_ids: Token ids of the whole text.
        offsets: Characters (start, end) of each token.
        spans: Characters (start, end) of each answer, in order.
        unk_id: The unknown token, which has no loss (the public implementation ignores its id).
    Returns:
        One label per token: its id if it is in the loss, else ``IGNORE_INDEX``.
    """
    labels = [IGNORE_INDEX] * len(token_ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for position, (token, (start, _)) in enumerate(zip(token_ids, offsets, strict=True)):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if start >= span[0] and token != unk_id:
            labels[position] = token
    return labels


def label_text(token_ids: Sequence[int]) -> list[int]:
    """Labels of plain text: all tokens except the first, which is never predicted."""
    return [IGNORE_INDEX, *token_ids[1:]]
