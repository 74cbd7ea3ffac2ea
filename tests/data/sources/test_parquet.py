from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.mixture import Mixture, SampleRef
from sphinxkit.data.samples import StoredImage
from sphinxkit.data.sources import open_source
from sphinxkit.errors import DataError

pytestmark = pytest.mark.integration


def write(path: Path, rows: list[dict[str, Any]], group: int = 3) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_rows_of_several_groups_and_files(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / f"{shard}.parquet", [{"content": f"{shard}-{row}", "url": "u"} for row in range(8)])
    source = open_source(tmp_path / "*.parquet", columns={"text": "content"})
    wanted = [f"{shard}-{row}" for shard in range(2) for row in range(8)]
    order = [15, 0, 7, 8, 3, *range(16)]
    assert [source.read(number).fields for number in order] == [{"text": wanted[number]} for number in order]
    assert [source.number(number) for number in range(16)] == list(range(16))
    assert source.read(12).where == source.where(12) == f"{tmp_path / '1.parquet'}:row 4"
    sources = [{"path": "*.parquet", "type": "text", "columns": {"text": "content"}}]
    mixture = Mixture(sources, folder=str(tmp_path))  # type: ignore[arg-type]
    assert sorted(mixture.read(ref).text for ref in mixture.order()) == sorted(wanted)


def test_image_columns_of_hugging_face(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": b"png", "path": None}, "caption": "one"},
        {"image": {"bytes": None, "path": "b.png"}, "caption": "two"},
    ]
    write(tmp_path / "a.parquet", rows)
    mixture = Mixture([{"path": "a.parquet", "task": "caption"}], folder=str(tmp_path))  # type: ignore[list-item]
    first, second = (mixture.read(SampleRef(0, number, 0)) for number in range(2))
    assert isinstance(first.image, StoredImage)
    assert first.image.data == b"png"
    assert second.image == tmp_path / "b.png"
    assert second.messages[1]["content"] == "two"


def test_rows_with_and_without_image_are_told_apart(tmp_path: Path) -> None:
    import pyarrow

    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    has_image = [True, True, False, True, False, False, False, True, True, True]
    rows = [
        {"picture": {"bytes": f"{n}".encode(), "path": None} if is_there else None, "conversations": turns}
        for n, is_there in enumerate(has_image)
    ]
    paths = [{"picture": "p.png" if is_there else "", "conversations": turns} for is_there in has_image]
    lists = [
        {"images": [f"{n}.png"] if is_there else [], "conversations": turns} for n, is_there in enumerate(has_image)
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert pyarrow.types.is_struct(table.schema.field("picture").type)
    for name, content, columns in (
        ("structs", rows, {"image": "picture"}),
        ("paths", paths, {"image": "picture"}),
        ("lists", lists, None),
    ):
        parts = dict(open_source(write(tmp_path / f"{name}.parquet", content), columns=columns).split())
        numbers = {kind: [part.number(n) for n in range(len(part))] for kind, part in parts.items()}
        assert numbers["image-text"] == [n for n, is_there in enumerate(has_image) if is_there]
        assert numbers["text"] == [n for n, is_there in enumerate(has_image) if not is_there]
        mixture = Mixture([{"path": f"{name}.parquet", "columns": columns}], folder=str(tmp_path))  # type: ignore[list-item]
        kinds = Counter(mixture.read(ref).type for ref in mixture.order())
        assert kinds == {"image-text": 6, "text": 4}
    parts = dict(open_source(tmp_path / "structs.parquet", columns={"image": "picture"}).split())
    assert [parts["image-text"].read(n).fields["image"].data for n in range(6)] == [b"0", b"1", b"3", b"7", b"8", b"9"]


def test_tables_that_are_refused_at_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"content": "x"}])
    with pytest.raises(DataError, match=r"no column of image, .*; map one \(columns\)\. It has: content"):
        open_source(path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body' for 'text'; it has: content"):
        open_source(path, columns={"text": "body"})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: damaged, cut off or no Parquet file"):
        open_source(path, columns={"text": "content"})
