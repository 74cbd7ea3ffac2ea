from __future__ import annotations

from pathlib import Path

import pytest

from sphinxkit.data.converters import Problems, Source, convert_records
from sphinxkit.errors import DataError


def test_one_class_per_folder(tmp_path: Path) -> None:
    for name in ("tabby_cat/b.JPEG", "tabby_cat/deep/a.png", "dog/c.webp", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "readme.txt").touch()
    problems = Problems()
    records = list(convert_records(Source(tmp_path), "imagefolder", None, problems, wording=0))
    assert [(record["image"], record["conversations"][1]["value"]) for record in records] == [
        ("dog/c.webp", "This is a dog."),
        ("tabby_cat/b.JPEG", "This is a tabby cat."),
        ("tabby_cat/deep/a.png", "This is a tabby cat."),
    ]
    assert [problem.reason for problem in problems.listed] == ["not an image by its suffix '.txt'"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match="expected a folder with one sub-folder per class"):
        list(convert_records(Source(tmp_path / "a"), "imagefolder", None, Problems()))
