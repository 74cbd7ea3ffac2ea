from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sphinxkit.data.sources import index, index_data, open_source
from sphinxkit.data.sources.base import ENTRY, ShardChangedError
from sphinxkit.errors import DataError


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pair(key: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(number)), (f"{key}.txt", f"a caption {number}".encode())]


def jsonl(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_lines_in_any_order_and_in_another_process(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", b'\xef\xbb\xbf{"a": 0}\n\n  {"a": 1}\r\n{"a": "\xc3\xa4"}')
    source = open_source(path)
    assert len(source) == 3
    assert [source.read(number).fields["a"] for number in (2, 0, 1)] == ["\u00e4", 0, 1]
    assert source.read(1).where == source.where(1) == f"{path}:3"
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1).fields == {"a": 1}
    copy.close()
    assert copy.read(0).fields == {"a": 0}
    assert len(pickle.dumps(source)) < 500  # the index stays in its file


@pytest.mark.parametrize("name", ["mix.jsonl", "mix.json"])
def test_types_are_told_by_the_records_not_by_their_words(tmp_path: Path, name: str) -> None:
    rows: list[Mapping[str, Any]] = [
        {"image": "a.png", "n": 0},
        {"n": 1, "value": 'it says "image" and \u00e4 ], }'},
        {"n": 2, "image": ""},
        {"n": 3, "images": ["b.png"]},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if name.endswith("jsonl") else "[\n " + " ,\n".join(lines) + "\n]\n"
    (tmp_path / name).write_text(text)
    parts = dict(open_source(tmp_path / name).split())
    found = {
        kind: [(part.read(i).fields["n"], part.number(i)) for i in range(len(part))] for kind, part in parts.items()
    }
    assert found == {"image-text": [(0, 0), (3, 3)], "text": [(1, 1), (2, 2)]}


def test_lists_longer_than_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.data.sources.jsonl.WINDOW", 16)
    rows = [{"n": number, "text": "\u00e4" * (number * 7)} for number in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    source = open_source(tmp_path / "a.json")
    assert [source.read(number).fields for number in range(len(source))] == rows
    assert source.read(4).where == f"{tmp_path / 'a.json'}[4]"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(tmp_path: Path, form: int) -> None:
    long = "d" * 90 + "/" + "k" * 60
    if form != tarfile.USTAR_FORMAT:
        long = "d" * 150 + "/\u00e4" + "k" * 60
    write_tar(tmp_path / "0.tar", [*pair("0000", 0), *pair(long, 1)], form)
    extra = [("x/3.json", json.dumps({"caption": "from json", "image": "no"}).encode()), ("x/3.JPG", png(3))]
    write_tar(tmp_path / "1.tar", [*extra, ("4.txt", b"alone")], form)
    source = open_source(tmp_path / "*.tar")
    assert len(source) == 4
    images = dict(source.split())["image-text"]
    captions = [images.read(number).fields["caption"] for number in range(3)]
    assert captions == ["a caption 0", "a caption 1", "from json"]
    assert [images.read(number).fields["image"].data for number in range(3)] == [png(0), png(1), png(3)]
    assert images.number(2) == 2
    assert dict(source.split())["text"].read(0).fields == {"caption": "alone"}
    mapped = open_source(tmp_path / "0.tar", columns={"text": "txt"})
    assert mapped.read(0).fields["text"] == "a caption 0"


def test_columns_name_the_image(tmp_path: Path) -> None:
    """A record has an image where its mapped key or member is there, whatever its name."""
    jsonl(tmp_path / "s.jsonl", b'{"photo": "a.png", "n": 0}\n{"n": 1, "note": "a \\"photo\\""}\n')
    parts = dict(open_source(tmp_path / "s.jsonl", columns={"image": "photo"}).split())
    assert [(kind, part.read(0).fields["n"], len(part)) for kind, part in parts.items()] == [
        ("image-text", 0, 1),
        ("text", 1, 1),
    ]
    assert [kind for kind, _ in open_source(tmp_path / "s.jsonl").split()] == ["text"]
    extra = [("0.left.raw", png(5)), ("0.jpg", b"no"), ("0.title.txt", b"a title"), ("0.cls", b"\xff")]
    write_tar(tmp_path / "a.tar", [("._0.txt", b"of another system"), *extra])
    source = open_source(tmp_path / "a.tar", columns={"image": "left.raw", "caption": "title.txt"})
    assert len(source) == 1
    fields = source.read(0).fields
    assert (fields["image"].data, fields["caption"]) == (png(5), "a title")
    assert str(fields["image"]) == f"{tmp_path / 'a.tar'}:0.left.raw"


def test_lines_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.data.sources.jsonl.BLOCK", 16)
    lines = [b'{"n": %d, "text": "%s"}' % (n, b"x" * (n * 7 % 30)) for n in range(40)]
    content = b"\xef\xbb\xbf" + b"\n\n".join(lines)
    source = open_source(jsonl(tmp_path / "s.jsonl", content))
    assert [source.read(n).fields["n"] for n in range(len(source))] == list(range(40))
    assert [source.where(n) for n in range(40)] == [f"{tmp_path / 's.jsonl'}:{2 * n + 1}" for n in range(40)]


def test_damaged_and_cut_tars_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pair("0", 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"a\.tar: cut off: the archive ends without its end mark after 700 bytes"):
        open_source(path)
    path.write_bytes(whole[:550])
    with pytest.raises(DataError, match=r"a\.tar: cut off: a member at byte 0 has \d+ bytes, 38 are there"):
        open_source(path)
    path.write_bytes(whole[:512] + whole[512:].replace(b"0.txt", b"1.txt"))
    with pytest.raises(DataError, match=r"a\.tar: damaged or cut off at byte 1024: the header's checksum is wrong"):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.jsonl", b"\n \n", "no records"),
        ("s.jsonl", b' [{"a": 1}]', "expected JSON lines, got a JSON list; write `format: llava`"),
        ("s.jsonl", b'{"a": 1}\n{"a": ', "the file is cut off: line 2, the last, is not JSON"),
        ("s.jsonl", b"\0\1", "expected JSON lines, got a binary file"),
        ("s.jsonl", b"PAR1\x15\x04", "expected JSON lines, got a Parquet file"),
        (
            "s.jsonl.gz",
            gzip.compress(b"{}", mtime=0),
            r"a gzip file cannot be read at any record; unpack it: gunzip -k .*s\.jsonl\.gz",
        ),
        ("s.jsonl.zst", b"\x28\xb5\x2f\xfdx", r"unpack it: zstd -d .*s\.jsonl\.zst"),
        ("s.tar", b'{"a": 1}\n', "expected a tar archive, got something else"),
        ("s.parquet", b"text\n", "expected a Parquet file, got something else"),
        ("s.tar", b"", "the file is empty"),
        ("s.json", b"", "no records"),
        ("s.json", b'[{"a": 1}, {"a"', r"s\.json\[1\]: the file is cut off or not JSON"),
        ("s.json", b'[{"a": 1} {"a": 2}]', r"s\.json\[1\]: expected ',' or '\]'"),
    ],
)
def test_files_that_are_refused_at_opening(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(jsonl(tmp_path / name, content))


def test_records_that_are_refused(tmp_path: Path) -> None:
    source = open_source(jsonl(tmp_path / "s.jsonl", b'{"a": 1}\n{"a"\n3\n'))
    with pytest.raises(DataError, match=r"s\.jsonl:2: not JSON"):
        source.read(1)
    with pytest.raises(DataError, match=r"s\.jsonl:3: a record must be an object, got int"):
        source.read(2)


def test_globs_and_folders(tmp_path: Path) -> None:
    for number in (1, 0):
        jsonl(tmp_path / f"{number}.jsonl", f'{{"n": {number * 10}}}\n{{"n": {number * 10 + 1}}}\n'.encode())
    for path in (tmp_path, tmp_path / "*.jsonl"):
        source = open_source(path)
        assert [source.read(number).fields["n"] for number in range(4)] == [0, 1, 10, 11]
        assert [source.number(number) for number in range(4)] == [0, 1, 2, 3]
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match=r"the folder holds \.jsonl, \.tar; name a `format` or write a glob"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, "jsonl")) == 4
    with pytest.raises(DataError, match="there are no files"):
        open_source(tmp_path / "*.ndjson")
    with pytest.raises(DataError, match=r"unknown format 'jsnl'.*did you mean 'jsonl'"):
        open_source(tmp_path, "jsnl")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        open_source(tmp_path / "none.jsonl")


def test_an_index_is_built_once_and_again_when_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "s.jsonl", b'{"a": 0}\n' * 1000)
    source = open_source(path)
    assert source.index.stat().st_size <= ENTRY.itemsize * 1000 + 1000
    with monkeypatch.context() as patched:
        patched.setattr(index, "_scan", None)
        assert len(open_source(path)) == 1000
    os.truncate(path, 9 * 500)
    with pytest.raises(ShardChangedError, match=r"s\.jsonl: the file has changed or been cut since it was indexed"):
        source.read(0)
    assert len(open_source(path)) == 500


def test_of_many_that_start_at_once_one_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "s.jsonl", b'{"a": 0}\n' * 10)
    scans = []

    def scan(*arguments: Any, original: Any = index._scan) -> Any:
        scans.append(arguments)
        time.sleep(0.05)
        return original(*arguments)

    monkeypatch.setattr(index, "_scan", scan)
    with ThreadPoolExecutor(4) as pool:  # a lock of a file keeps threads apart as it does processes
        assert len({source.index for source in pool.map(open_source, [path] * 4)}) == 1
    assert len(scans) == 1


def test_a_shard_cut_under_a_reader_stops_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", b'{"a": 0}\n' * 1000)
    source = open_source(path)
    assert source.read(999).fields == {"a": 0}
    os.truncate(path, 9 * 500)
    with pytest.raises(ShardChangedError, match=r"s\.jsonl: the file has changed .*it had 9000 bytes, now 4500"):
        source.read(999)
    path.unlink()
    with pytest.raises(ShardChangedError, match=r"s\.jsonl: cannot be read: No such file.* when it was indexed"):
        pickle.loads(pickle.dumps(source)).read(0)
    jsonl(path, b'{"a": 0}\n')
    state = pickle.dumps(source)
    assert len(open_source(path)) == 1
    assert len(list(source.index.parent.glob(source.index.name[:32] + "-*"))) == 1  # the old one is deleted
    with pytest.raises(ShardChangedError, match="the index is gone"):
        pickle.loads(state)


def test_shards_are_indexed_in_parallel_as_one_by_one(tmp_path: Path) -> None:
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", [member for n in range(3) for member in pair(f"{number}{n}", n)])
    report = index_data(tmp_path / "*.tar", workers=2)
    assert (report.records, report.shards, report.format) == (15, 5, "tar")
    parallel = Path(report.file).read_bytes()
    Path(report.file).unlink()
    assert Path(index_data(tmp_path / "*.tar", workers=1).file).read_bytes() == parallel


def test_the_cache_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "s.jsonl", b"{}\n")
    monkeypatch.setenv("SPHINXKIT_CACHE", str(path))
    with pytest.raises(DataError, match="the index cannot be written .* set SPHINXKIT_CACHE"):
        open_source(path)


@pytest.mark.parametrize("name", ["captions.jsonl", "deep/part.0.parquet", "rows.jsonl.gz"])
def test_tars_of_files_of_records_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [("0.txt", b"a caption"), (name, b"{}")])
    with pytest.raises(DataError, match=rf"a\.tar: a tar archive of '{name}', expected members of records"):
        open_source(tmp_path / "a.tar")
