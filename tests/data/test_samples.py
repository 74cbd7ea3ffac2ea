from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from sphinxkit.data.samples import Sample, StoredImage
from sphinxkit.errors import DataError


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


def test_stored_images() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (1, 2, 3)).save(buffer, "PNG")
    sample = Sample("s:0", "", (), "x", StoredImage("a.tar:b.png", buffer.getvalue()), "a.tar:b")
    assert sample.open_image().getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(DataError, match=r"sample s:1: image a\.tar:b\.png: not an image"):
        Sample("s:1", "", (), "x", StoredImage("a.tar:b.png", b"no image"), "a.tar:b").open_image()
