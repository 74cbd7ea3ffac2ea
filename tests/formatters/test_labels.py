from __future__ import annotations

import torch

from sphinxkit.formatters.labels import IGNORE_INDEX, label_spans, label_text, next_token_targets

NO = IGNORE_INDEX


def test_a_label_is_the_target_of_the_token_before_it() -> None:
    labels = torch.tensor([[NO, 5, 6, 7, 8, 9]])
    assert next_token_targets(labels).tolist() == [[5, 6, 7, 8, 9]]
    # packed: the first tokens of the second and the third sample continue nothing
    assert next_token_targets(labels, [2, 3, 1]).tolist() == [[5, NO, 7, 8, NO]]
    assert next_token_targets(labels, [6]).tolist() == [[5, 6, 7, 8, 9]]
    assert labels.tolist() == [[NO, 5, 6, 7, 8, 9]]


def test_a_token_belongs_to_where_its_first_character_lies() -> None:
    offsets = [(0, 2), (2, 5), (5, 6), (6, 9), (9, 12)]
    assert label_spans([1, 2, 3, 4, 5], offsets, [(3, 7), (9, 10)], unk_id=0) == [NO, NO, 3, 4, 5]
    assert label_spans([1, 2, 0, 4, 5], offsets, [(3, 7)], unk_id=0) == [NO, NO, NO, 4, NO]
    assert label_spans([1, 2], offsets[:2], [], unk_id=0) == [NO, NO]


def test_plain_text_is_learnt_whole() -> None:
    assert label_text([1, 5, 6, 2]) == [NO, 5, 6, 2]
