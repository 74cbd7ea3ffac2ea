from __future__ import annotations

import gzip
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sphinxkit.data.samples import JsonLinesFile, Sample
from sphinxkit.errors import DataError


def _file(tmp_path: Path, content: bytes) -> JsonLinesFile:
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    return JsonLinesFile(path)


def test_any_record_in_any_order(tmp_path: Path) -> None:
    file = _file(tmp_path, b'\xef\xbb\xbf{"a": 0}\n\n  {"a": 1}\r\n{"a": "\xc3\xa4"}')
    assert len(file) == 3
    assert [file.read(index)["a"] for index in (2, 0, 1)] == ["ä", 0, 1]
    assert file.where(1) == f"{file.path}:3"


def test_it_can_be_carried_to_another_process(tmp_path: Path) -> None:
    file = _file(tmp_path, b'{"a": 0}\n{"a": 1}\n')
    file.read(0)
    copy = pickle.loads(pickle.dumps(file))
    assert copy.read(1) == {"a": 1}
    assert len(copy) == 2
    copy.close()
    assert copy.read(0) == {"a": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", r"s\.jsonl: no records"),
        (b' [{"a": 1}]', r"s\.jsonl: a JSON list cannot be read at any record; make one with `sphinxkit convert-data"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _file(tmp_path, content)


def test_records_that_are_refused(tmp_path: Path) -> None:
    file = _file(tmp_path, b'{"a": 1}\n{"a"\n3\n')
    with pytest.raises(DataError, match=r"s\.jsonl:2: not JSON"):
        file.read(1)
    with pytest.raises(DataError, match=r"s\.jsonl:3: a record must be an object, got int"):
        file.read(2)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        JsonLinesFile(tmp_path / "none.jsonl")


def test_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "a.png")
    sample = Sample("s:0", "", (), "x", tmp_path / "a.png", "s.jsonl:1")
    assert sample.type == "image-text"
    assert sample.open_image().size == (4, 3)
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"sample s:1: .*b\.png"):
        Sample("s:1", "", (), "x", tmp_path / "b.png", "s.jsonl:2").open_image()
    text = Sample("s:2", "", (), "x", None, "s.jsonl:3")
    assert text.type == "text"
    with pytest.raises(DataError, match="sample s:2: it has no image"):
        text.open_image()


def test_binary_files_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    plain = tmp_path / "a.jsonl"
    plain.write_text('{"text": "' + "ä" * 4000 + '"}\n')
    assert len(JsonLinesFile(plain)) == 1  # the last character of the head is cut off
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(plain, "a.jsonl")
    (tmp_path / "a.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.parquet").write_bytes(b"PAR1\x15\x04\x00\x15")
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    for name, kind in (
        ("tar", "tar archive"),
        ("gz", "gzip file"),
        ("parquet", "Parquet file"),
        ("bin", "binary file"),
    ):
        with pytest.raises(
            DataError, match=rf"a\.{name}: expected JSON lines, got a {kind}; unpack or convert it first"
        ):
            JsonLinesFile(tmp_path / f"a.{name}")
