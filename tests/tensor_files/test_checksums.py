from __future__ import annotations

from pathlib import Path

from sphinxkit.tensor_files.checksums import Check, compare, file_sha256


def test_ranges_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"..123456789..")
    assert compare([Check(path, 2, 11, "crc32", "cbf43926", "no")]) == []  # the CRC-32 check value
    assert compare([Check(path, 1, 11, "crc32", "cbf43926", "no")]) == ["no"]
    digest = "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"  # of the same nine digits
    assert compare([Check(path, 2, 11, "sha256", digest, "no")]) == []
    assert compare([Check(path, 3, 3, "crc32", "00000000", "no")]) == []
    assert compare([Check(path, 2, 99, "sha256", digest, "cut")]) == ["cut"]
    [message] = compare([Check(tmp_path / "gone", 0, 1, "crc32", "0", "no")])
    assert "gone: cannot be read" in message
    path.write_bytes(b"123456789")
    assert file_sha256(path) == file_sha256(str(path)) == digest
