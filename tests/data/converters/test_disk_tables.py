from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.data.converters import disk_tables
from sphinxkit.data.converters.base import Problems, RecordError
from sphinxkit.data.converters.disk_tables import DiskTables


@given(st.lists(st.tuples(st.integers(0, 4) | st.sampled_from(["0", "x", "ä"]), st.integers(0, 9)), max_size=40))
def test_groups_are_those_of_a_dictionary(rows: list[tuple[int | str, int]]) -> None:
    wanted: dict[str, list[tuple[int, int]]] = {}
    with DiskTables() as tables:
        for line, (key, value) in enumerate(rows):
            tables.add(key, line, value)
            wanted.setdefault(str(key), []).append((line, value))
        assert list(tables.groups()) == list(wanted.items())


def test_entries(tmp_path: Path) -> None:
    with DiskTables() as tables:
        tables.put("a", 1, [1, "x"])
        tables.put("b", "1", None)
        tables.put("a", "2", {"other": True})
        tables.put("a", 2, {"other": True})
        assert tables.get("a", 1) == [1, "x"]
        assert tables.get("a", 2) == {"other": True}
        assert tables.get("b", 1) is None
        assert tables.get("c", 1) is None
        folder = Path(tables._folder.name)
        assert folder.exists()
    assert not folder.exists()


def test_keys_that_are_there_more_than_once() -> None:
    problems, path = Problems(), Path("a.json")
    with DiskTables() as tables:
        for line, (key, value) in enumerate([(1, "a"), (2, "b"), ("1", "c"), (2, "b"), (3, "d")], 10):
            tables.put("images", key, value, line)
        tables.put("other", 3, "e")
        with pytest.raises(RecordError, match="id 1 is there more than once among the images, with different content"):
            tables.get("images", 1)
        assert [tables.get("images", key) for key in (2, 3)] == ["b", "d"]
        tables.report_repeated("images", problems, path)
        tables.report_repeated("other", problems, path)
    assert [(problem.line, problem.reason) for problem in problems.listed] == [
        (12, "images: id 1 is there 2 times, with different content; what refers to it is left out"),
        (13, "images: id 2 is there 2 times, each time the same"),
    ]


def test_rows_beyond_one_batch() -> None:
    count = disk_tables.BATCH + 10
    with DiskTables() as tables:
        for index in range(count):
            tables.add(index % 2, index, index)
            tables.put("s", index, index)
        assert [(key, len(rows)) for key, rows in tables.groups()] == [("0", count // 2), ("1", count // 2)]
        assert tables.get("s", count - 1) == count - 1
