from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.data import json_stream
from sphinxkit.data.json_stream import (
    is_finite_number,
    is_json_lines,
    iter_json,
    iter_json_lines,
    iter_json_members,
    iter_records,
)
from sphinxkit.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.sampled_from([1, 3, 7, 1 << 20]))
def test_arrays_and_objects_at_every_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], indent: int | None, is_ascii: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        _write(path, json.dumps(records, indent=indent, ensure_ascii=is_ascii))
        assert [item.value for item in iter_json(path)] == records
        members = {f"k{index}": record for index, record in enumerate(records)}
        _write(path, json.dumps(members, indent=indent, ensure_ascii=is_ascii))
        assert {item.key: item.value for item in iter_json(path)} == members
        whole = {"before": records, "wanted": records, "scalar": 1.5, "after": members}
        _write(path, json.dumps(whole, indent=indent, ensure_ascii=is_ascii))
        found = list(iter_json_members(path, ["wanted", "scalar"]))
        assert [item.value for name, item in found if name == "wanted"] == records
        assert [item.value for name, item in found if name == "scalar"] == [1.5]


def test_lines_are_those_of_the_records(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", '\n[ {"a":\n 1},\n\n {"b": "\\n,]}["}, 3\n]\n')
    assert [(item.line, item.value) for item in iter_json(path)] == [(2, {"a": 1}), (5, {"b": "\n,]}["}), (5, 3)]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf[1, 22]")
    assert [item.value for item in iter_json(path)] == [1, 22]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}')
    assert [item.value for item in iter_records(path)] == [{"a": 1}, {"a": 2}]


def test_malformed_records_are_reported_with_their_line_and_skipped(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", '[{"a": 1},\n{"a": ,\n "b": [1, 2]},\n{"a" 2},\nnul,\n{"a": "]"}]')
    seen: list[tuple[int, str]] = []
    found = list(iter_json(path, lambda line, reason: seen.append((line, reason))))
    assert [item.value for item in found] == [{"a": 1}, {"a": "]"}]
    assert [line for line, _ in seen] == [2, 4, 5]
    assert all(reason.startswith("not JSON: ") for _, reason in seen)


def test_without_a_listener_a_malformed_record_is_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", '[1,\n{"a" 2}]')
    with pytest.raises(DataError, match=r"a\.json:2: not JSON: Expecting ':' delimiter"):
        list(iter_json(path))
    path = _write(tmp_path / "b.json", '{"x": [1,\n{"a" 2}]}')
    with pytest.raises(DataError, match=r"b\.json:2: not JSON"):
        list(iter_json_members(path, ["x"]))
    path = _write(tmp_path / "c.json", '{"x": [1], "y" : nul}')
    with pytest.raises(DataError, match=r"c\.json:1: not JSON"):
        list(iter_json_members(path, ["x"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.json:1: expected an array or an object, found ''"),
        ("3", r"a\.json:1: expected an array or an object, found '3'"),
        ('[1,\n{"a": 2', r"a\.json:2: the file ends inside this record"),
        ('[1,\n{"a": "x', r"a\.json:2: the file ends inside this record"),
        ("[1,\n", r"a\.json:2: ends where a record is due"),
        ("[1\n2]", r"a\.json:2: expected ',' or '\]' after a record, found '2'"),
        ("[1]\n[2]", r"a\.json:2: text after the end: '\['"),
        ("{1: 2}", r"a\.json:1: expected a key, found '1'"),
        ('{"a" 2}', r"a\.json:1: expected ':', found '2'"),
        ('{"a"', r"a\.json:1: ends where ':' is due"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(iter_json(_write(tmp_path / "a.json", text), lambda _line, _reason: None))


def test_members_that_are_missing_or_unreadable(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", '{"a": [1]}')
    with pytest.raises(DataError, match=r"a\.json: the object has no member b, c"):
        list(iter_json_members(path, ["a", "b", "c"]))
    with pytest.raises(DataError, match=r"a\.json:1: expected '\{', found '\['"):
        list(iter_json_members(_write(path, "[1]"), ["a"]))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"a\.json:1: not UTF-8"):
        list(iter_json(path))
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        list(iter_json(tmp_path / "none.json"))


def test_nesting_beyond_the_decoders_depth_is_malformed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", "[1, " + "[" * 200_000 + "]" * 200_000 + ", 2]")
    seen: list[str] = []
    assert [item.value for item in iter_json(path, lambda _, reason: seen.append(reason))] == [1, 2]
    assert seen == ["not JSON: nested too deeply"]


def test_an_integer_of_thousands_of_digits_is_malformed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", f'[1, {{"id": {"9" * 5000}}}, 2]')
    seen: list[str] = []
    assert [item.value for item in iter_json(path, lambda _, reason: seen.append(reason))] == [1, 2]
    assert len(seen) == 1
    assert "not JSON: Exceeds the limit" in seen[0]


@pytest.mark.parametrize(
    ("value", "wanted"), [(1, True), (-0.5, True), (True, False), ("1", False), (math.inf, False), (10**400, False)]
)
def test_is_finite_number(value: object, wanted: bool) -> None:
    assert is_finite_number(value) is wanted


def test_json_lines(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a"\n{"a": 3}')
    seen: list[int] = []
    assert [(i.line, i.value) for i in iter_json_lines(path, lambda line, _: seen.append(line))] == [
        (1, {"a": 1}),
        (4, {"a": 3}),
    ]
    assert seen == [3]
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        list(iter_json_lines(path))
    with pytest.raises(DataError, match=r"none: cannot be read"):
        list(iter_json_lines(tmp_path / "none"))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.jsonl", "", True),
        ("a.json", '{"a": 1}\n\n{"a": 2}\n', True),
        ("a.json", '{"a": 1}\n', False),
        ("a.json", '{\n "a": 1}\n', False),
        ("a.json", '[{"a": 1},\n{"a": 2}]', False),
        ("a.json", "", False),
    ],
)
def test_is_json_lines(tmp_path: Path, name: str, text: str, wanted: bool) -> None:
    assert is_json_lines(_write(tmp_path / name, text)) is wanted
    with pytest.raises(DataError, match="none: cannot be read"):
        is_json_lines(tmp_path / "none")
