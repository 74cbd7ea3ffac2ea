from __future__ import annotations

import torch

from sphinxkit.to_device import to_device


def test_numbers_keep_torchs_defaults() -> None:
    assert to_device([1, 2], "cpu").dtype == torch.int64
    assert to_device([0.5], "cpu").dtype == torch.float32
    assert to_device((1, 2), "cpu", torch.bfloat16).tolist() == [1, 2]
    assert to_device([1, 2], "meta").is_meta


def test_a_tensor_that_is_there_is_not_copied() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
    assert to_device(tensor, "cpu", torch.float32).dtype == torch.float32


def test_the_default_device_does_not_matter() -> None:
    tensor = torch.arange(3)
    with torch.device("meta"):
        assert to_device([1, 2], "cpu").tolist() == [1, 2]
        assert to_device(tensor, "cpu") is tensor


def test_numbers_have_a_dtype_whatever_the_host_programs_default_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert to_device([0.1], torch.device("cpu")).dtype == torch.float32
        exact = to_device([0.1], torch.device("cpu"), torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert exact.item() == 0.1
    assert to_device([1, 2], torch.device("cpu")).dtype == torch.int64
    assert to_device([True], torch.device("cpu")).dtype == torch.bool
