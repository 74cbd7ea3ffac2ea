from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinxkit.checkpoint.entries import Entry, bitwise_equal
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.lazy import StoredTensor


def stored(file: str, tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(Path(file), "w", tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_slices_are_joined_along_their_dimension() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    rows = Entry([stored("0", a), stored("1", b)], dim=0)
    columns = Entry([stored("0", a), stored("1", b)], dim=1)
    assert (rows.shape, columns.shape) == ((2, 2), (1, 4))
    assert rows.read().tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert columns.read().tolist() == [[1.0, 2.0, 3.0, 4.0]]
    out = torch.empty(1, 4, dtype=torch.float16)
    columns.copy_into(out)
    assert out.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_copies_must_agree_unless_the_first_is_wanted() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0])
    parts = [stored("first.pth", a), stored("second.pth", b)]
    with pytest.raises(
        CheckpointError, match=r"second.pth: 'w' .* first.pth; pass replicas='first' \(--replicas first\)"
    ):
        Entry(parts).read()
    with pytest.raises(CheckpointError, match="differs from"):
        Entry(parts).copy_into(torch.empty(2))
    assert Entry(parts, replicas="first").read() is a
    nan = torch.tensor([float("nan")])
    assert Entry([stored("0", nan), stored("1", nan.clone())]).read() is nan


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"b.pth: 'w' is \[3\] float32, but \[2\] float32 in a.pth"):
        Entry([stored("a.pth", torch.zeros(2)), stored("b.pth", torch.zeros(3))], dim=0)
    with pytest.raises(CheckpointError, match=r"\[2\] float16, but \[2\] float32"):
        Entry([stored("a.pth", torch.zeros(2)), stored("b.pth", torch.zeros(2).half())], dim=0)
    with pytest.raises(CheckpointError, match=r"'w' is \[2\] float32, it has no dimension 1"):
        Entry([stored("a.pth", torch.zeros(2)), stored("b.pth", torch.zeros(2))], dim=1)


def test_bitwise_equality() -> None:
    nan = torch.tensor([float("nan")])
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(2, 1))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert bitwise_equal(torch.tensor([1 + 2j]), torch.tensor([1 + 2j]))
    assert bitwise_equal(torch.tensor(True), torch.tensor(True))
    assert bitwise_equal(torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous())
