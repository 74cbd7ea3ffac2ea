from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.data.converters import disk_tables
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
        tables.put("a", "1", {"later": True})
        assert tables.get("a", 1) == {"later": True}
        assert tables.get("b", 1) is None
        assert tables.get("c", 1) is None
        folder = Path(tables._folder.name)
        assert folder.exists()
    assert not folder.exists()


def test_rows_beyond_one_batch() -> None:
    count = disk_tables.BATCH + 10
    with DiskTables() as tables:
        for index in range(count):
            tables.add(index % 2, index, index)
            tables.put("s", index, index)
        assert [(key, len(rows)) for key, rows in tables.groups()] == [("0", count // 2), ("1", count // 2)]
        assert tables.get("s", count - 1) == count - 1
