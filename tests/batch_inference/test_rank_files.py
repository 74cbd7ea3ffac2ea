from __future__ import annotations

from pathlib import Path

import pytest

from sphinxkit.batch_inference.rank_files import find_parts, finish_part, make_line, open_part, part_path, read_answers
from sphinxkit.errors import DataError


def line(index: int, **fields: str) -> bytes:
    return make_line({"index": index, "request": f"r{index}", **fields})


def test_names(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    assert part_path(out, 1, 4).name == "a.jsonl.rank-1-of-4.part"
    for name in ("a.jsonl.rank-0-of-2.done", "a.jsonl.rank-1-of-4.part", "a.jsonl.rank-x-of-4.part", "ab.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in find_parts(out)] == ["a.jsonl.rank-0-of-2.done", "a.jsonl.rank-1-of-4.part"]


def test_lone_surrogates_are_written_as_utf8() -> None:
    assert make_line({"text": "é\ud800"}) == '{"text": "é\\ud800"}\n'.encode()


def test_the_last_rank_merges_in_the_order_of_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "a.jsonl"
    with open_part(out, 0, 2) as file:
        file.write(line(2, text="c") + line(0, error="x"))
    with open_part(out, 1, 2) as file:
        file.write(line(1, text="b") + line(0, text="a"))
    assert not finish_part(out, 0, 2, num_rows=3)
    assert finish_part(out, 1, 2, num_rows=3)
    assert out.read_bytes() == line(0, text="a") + line(1, text="b") + line(2, text="c")  # an answer replaces an error
    assert find_parts(out) == []


def test_a_missing_row_leaves_the_parts(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with open_part(out, 0, 1) as file:
        file.write(line(0, text="a"))
    assert not finish_part(out, 0, 1, num_rows=2)
    assert not out.exists()
    assert list(read_answers(out)) == [0]


def test_a_half_written_line_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    part_path(out, 0, 1).write_bytes(line(0, text="a") + b'{"index": 1, "req')
    with open_part(out, 0, 1) as file:
        file.write(line(1, text="b"))
    assert part_path(out, 0, 1).read_bytes() == line(0, text="a") + line(1, text="b")


def test_a_part_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with open_part(out, 0, 1), pytest.raises(DataError, match="another process is writing it"), open_part(out, 0, 1):
        pass


def test_somebody_elses_file(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text('{"index": 0, "request": "r"}\n{"answer": 1}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not an answer of this command"):
        read_answers(out)
