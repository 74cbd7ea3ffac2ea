from __future__ import annotations

import torch

from sphinxkit.tensor_files.spec import TensorSpec, tensor_bytes


def test_bytes_of_tensors() -> None:
    assert TensorSpec("w", (3, 5), torch.bfloat16).num_bytes == 30
    assert TensorSpec("scalar", (), torch.float64).num_bytes == 8
    assert bytes(tensor_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T)) == b"\1\0\3\0\2\0\4\0"
    assert bytes(tensor_bytes(torch.tensor(1.0, dtype=torch.bfloat16))) == b"\x80\x3f"
    assert bytes(tensor_bytes(torch.empty(0, 4))) == b""


def test_contiguous_memory_is_shared() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    view = tensor_bytes(tensor)
    tensor[2] = 7
    assert bytes(view) == b"\0\0\7\0"
