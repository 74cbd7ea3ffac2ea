from __future__ import annotations

import sys

import pytest

from sphinxkit.errors import DataError
from sphinxkit.formatters import to_detections
from sphinxkit.formatters.tasks import GroundedPhrase
from sphinxkit.geometry import Box, Point


def test_without_supervision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(DataError, match=r"to_detections needs supervision: pip install sphinxkit\[supervision\]"):
        to_detections([])


@pytest.mark.integration
def test_boxes_become_detections() -> None:
    pytest.importorskip("supervision")
    phrases = [GroundedPhrase("dog", (Box(1, 2, 3, 4), Box(5, 6, 7, 8))), GroundedPhrase("cat", (Box(0, 0, 1, 1),))]
    found = to_detections([*phrases, "words", Point(1, 2), Box(9, 9, 10, 12)])
    assert found.xyxy.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 1, 1], [9, 9, 10, 12]]
    assert found.class_id.tolist() == [0, 0, 1, 2]
    assert found.data["class_name"].tolist() == ["dog", "dog", "cat", ""]
    assert found.area.tolist() == [4, 4, 1, 3]
    assert found.confidence is None
    assert len(found[found.class_id == 1]) == 1
    assert len(to_detections(["no box"])) == 0
