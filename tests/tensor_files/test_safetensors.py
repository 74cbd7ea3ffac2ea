from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.safetensors import DTYPES, read_safetensors, write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec


def write_raw(path: Path, header: object, data: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_a_file_written_by_hand(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"who": "me"},
        "b": entry("F32", [2, 1], 4, 12),
        "a": entry("I16", [2], 0, 4),
        "none": entry("U8", [0, 3], 12, 12),
        "scalar": entry("BF16", [], 12, 14),
    }
    data = struct.pack("<hh", -2, 300) + struct.pack("<ff", 1.5, -0.25) + b"\x80\x3f"  # bf16 1.0 is 0x3f80
    tensors, metadata = read_safetensors(write_raw(tmp_path / "x.safetensors", header, data))
    assert metadata == {"who": "me"}
    assert {name: (stored.shape, stored.dtype) for name, stored in tensors.items()} == {
        "a": ((2,), torch.int16),
        "b": ((2, 1), torch.float32),
        "none": ((0, 3), torch.uint8),
        "scalar": ((), torch.bfloat16),
    }
    assert tensors["a"].view().tolist() == [-2, 300]
    assert tensors["b"].view().tolist() == [[1.5], [-0.25]]
    assert tensors["scalar"].view().item() == 1.0
    assert tensors["none"].view().numel() == 0


def test_writes_what_the_format_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"half": torch.tensor([1.0, -2.0], dtype=torch.float16), "long": torch.tensor([7])}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    written = write_safetensors(path, specs, tensors.__getitem__, {"k": "v"})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {
        "__metadata__": {"format": "pt", "k": "v"},
        "long": entry("I64", [1], 0, 8),
        "half": entry("F16", [2], 8, 12),
    }
    assert raw[8 + length :] == struct.pack("<q", 7) + b"\x00\x3c\x00\xc0"
    assert (written.size, written.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert write_safetensors(path, specs, tensors.__getitem__, checksum=False).sha256 == ""


def test_the_safetensors_library_agrees_both_ways(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): (torch.rand(3, 5, generator=generator) * 100).to(dtype)
        for dtype in DTYPES.values()
        if dtype is not torch.bool
    } | {"bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5)}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "ours.safetensors", specs, tensors.__getitem__)
    save_file(tensors, tmp_path / "theirs.safetensors")
    loaded = load_file(tmp_path / "ours.safetensors")
    read, _ = read_safetensors(tmp_path / "theirs.safetensors")
    assert loaded.keys() == read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.reshape(-1).view(torch.uint8)
        for other in (loaded[name], read[name].view()):
            assert other.dtype == tensor.dtype
            assert other.shape == tensor.shape
            assert torch.equal(other.reshape(-1).view(torch.uint8), expected)


def test_data_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(6.0)
    write_safetensors(path, [TensorSpec("a", (6,), torch.float32)], lambda name: tensor)
    stored = read_safetensors(path)[0]["a"]
    assert stored.view().untyped_storage().data_ptr() == stored.view().untyped_storage().data_ptr()
    assert str(path) in Path("/proc/self/maps").read_text()


def test_misaligned_data_is_still_right(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}
    tensors, _ = read_safetensors(write_raw(tmp_path / "x.safetensors", header, b"\x01" + struct.pack("<f", 3.5)))
    assert tensors["b"].view().item() == 3.5


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("F32", [2], 0, 8)}, b"1234567", "header describes .* truncated or tampered"),
        ({"a": entry("F32", [2], 0, 8)}, b"123456789", "header describes .* truncated or tampered"),
        ({"a": entry("F32", [3], 0, 8)}, b"12345678", r"'a' is \[3\] torch.float32 but has 8 bytes"),
        ({"a": entry("F32", [-2], 0, 8)}, b"12345678", r"'a' is \[-2\]"),
        ({"a": entry("F99", [2], 0, 8)}, b"12345678", "header entry 'a' cannot be used: KeyError"),
        ({"a": {"dtype": "F32", "shape": 2}}, b"", "header entry 'a' cannot be used"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123", "data of 'b' starts at 1, expected 2"),
        ({"a": entry("U8", [1], 1, 2)}, b"12", "data of 'a' starts at 1, expected 0"),
        (b"{not json}", b"", "header is damaged"),
        (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
        ([1, 2], b"", "it is not an object"),
        (b'{"a": ' + b"[" * 100_000, b"", "header is damaged"),
        ({"__metadata__": ["pt"]}, b"", "__metadata__ in the header is list, expected an object"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [Infinity, NaN]}}',
            b"",
            "'a' cannot be used",
        ),
        (b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', b"1234", "'a' cannot be used"),
    ],
)
def test_a_header_that_does_not_fit_is_an_error(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 10**15), struct.pack("<Q", 50) + b"{}"])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad.safetensors: not a safetensors file, or cut off"):
        read_safetensors(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")


def test_writer_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="complex64, which safetensors does not store"):
        write_safetensors(path, [TensorSpec("a", (1,), torch.complex64)], lambda name: torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"'a' was announced as \[1\] torch.float32 but is \[2\] torch.float32"):
        write_safetensors(path, [TensorSpec("a", (1,), torch.float32)], lambda name: torch.zeros(2))


@given(cut=st.integers(0, 160), flip=st.integers(0, 7))
def test_any_cut_or_flip_of_the_header_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    write_safetensors(path, [TensorSpec("a", (4,), torch.float32)], lambda name: torch.ones(4))
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: min(cut, len(raw) - 1)])
    with pytest.raises(CheckpointError):
        read_safetensors(path)
    raw[min(cut, len(raw) - 17)] ^= 1 << flip
    path.write_bytes(raw)
    try:
        tensors, _ = read_safetensors(path)
    except CheckpointError:
        return
    assert sum(stored.view().numel() * stored.dtype.itemsize for stored in tensors.values()) == 16
