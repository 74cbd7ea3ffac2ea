from __future__ import annotations

import os
from pathlib import Path

import pytest

from sphinxkit.errors import DataError
from sphinxkit.training import data_files
from sphinxkit.training.data_files import changed_files, content_digest, content_digests


def test_small_files_are_read_whole_and_large_ones_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 16)
    whole = content_digest(path)
    assert not whole.startswith("pieces")
    monkeypatch.setattr(data_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(data_files, "SAMPLES", 4)
    monkeypatch.setattr(data_files, "SAMPLE_BYTES", 16)
    pieces = content_digest(path)
    assert pieces.startswith("pieces")
    for place, seen in ((0, True), (4095, True), (1360, True), (600, False)):  # pieces begin at 0, 1360, 2720 and 4080
        changed = bytearray(path.read_bytes())
        changed[place] ^= 1
        other = tmp_path / "other"
        other.write_bytes(changed)
        assert (content_digest(other) != pieces) is seen
    os.truncate(path, 4095)
    assert content_digest(path) != pieces


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        content_digest(tmp_path / "nowhere")


def test_many_files_share_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / str(number) for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    assert content_digests(paths) == [content_digest(path) for path in paths]
    monkeypatch.setattr(data_files, "WHOLE_BYTES", 4000)
    monkeypatch.setattr(data_files, "MIN_SAMPLE_BYTES", 10)
    monkeypatch.setattr(data_files, "SAMPLES", 4)
    monkeypatch.setattr(data_files, "SAMPLE_BYTES", 50)
    pieces = content_digests(paths)  # two of 4 * 50 / (8 * 2) = 12 bytes each
    for place, is_seen in ((11, True), (12, False), (987, False), (988, True)):
        paths[3].write_bytes(bytes([3]) * place + b"x" + bytes([3]) * (999 - place))
        assert [one == other for one, other in zip(content_digests(paths), pieces, strict=True)] == [
            number != 3 or not is_seen for number in range(8)
        ]


def test_changed_files() -> None:
    paths = [Path("a"), Path("b")]
    assert changed_files(paths, ["1", "2"], ["1", "3"]) == [Path("b")]
    assert changed_files(paths, [], ["1", "3"]) == []  # an older run kept no digests
