"""``predict``: answers in order, nothing written."""

from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, predict, read_annotations

NAME = "gqa_testdev_balanced"


def test_predict_writes_nothing(files: Any) -> None:
    before = sorted(files.folder.rglob("*"))
    from_file = list(predict(files.model(), NAME, files.annotations, files.folder))
    read = read_annotations(files.annotations)
    from_list = list(predict(files.model(), benchmarks.get(NAME), read, files.folder, batch_size=3))
    assert [answer.answer for answer in from_file] == [str(i + 10) for i in range(7)]
    assert from_list == from_file
    assert sorted(files.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"conversation": None}, "this model has no conversation template"),
        ({"tokenizer": None}, "this model has no tokenizer: it cannot be asked"),
        ({"vision": None}, "this model has no vision tower, but the questions are about images"),
    ],
)
def test_a_model_that_cannot_be_asked(files: Any, fault: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(predict(files.model(**fault), NAME, files.annotations, files.folder))


def test_faults(files: Any) -> None:
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        list(predict(files.model(), NAME, files.annotations, files.folder, batch_size=0))
    with pytest.raises(DataError, match=r"holds none of the 7 images"):
        list(predict(files.model(), NAME, files.annotations, files.folder / "elsewhere"))
    with pytest.raises(DataError, match=r"unknown benchmark 'nothing'"):
        files.evaluate(files.model(), benchmark="nothing")
