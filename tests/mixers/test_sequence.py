from __future__ import annotations

import pytest
import torch

from sphinxkit.errors import ShapeError
from sphinxkit.mixers import SequenceMixer


def test_order_is_kept() -> None:
    qformer, visual = torch.randn(2, 32, 8), torch.randn(2, 257, 8)
    mixed = SequenceMixer()([qformer, visual])
    assert mixed.shape == (2, 289, 8)
    assert torch.equal(mixed[:, :32], qformer)
    assert torch.equal(mixed[:, 32:], visual)


def test_one_branch_is_left_alone() -> None:
    tokens = torch.randn(1, 3, 4)
    assert SequenceMixer()([tokens]) is tokens


@pytest.mark.parametrize("other", [(2, 5, 9), (3, 5, 8), (2, 8)])
def test_branches_that_do_not_fit(other: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"one B and one D, got \[\(2, 4, 8\), \(" + ", ".join(map(str, other))):
        SequenceMixer()([torch.zeros(2, 4, 8), torch.zeros(other)])


def test_no_branch() -> None:
    with pytest.raises(ShapeError, match="at least one branch's tokens"):
        SequenceMixer()([])
