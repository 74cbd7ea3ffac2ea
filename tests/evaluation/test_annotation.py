from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation.annotation import Annotation, image_size


@pytest.mark.parametrize(
    ("record", "size"),
    [
        ({"width": 640, "height": 480}, (640, 480)),
        ({"question_id": "x_height480_width640_1"}, (640, 480)),
        ({"question_id": "width640height480"}, (640, 480)),
        ({"width": "640", "height": 480}, None),
        ({"question_id": 7}, None),
        ({"width": 5, "height": 6, "question_id": "height1_width2"}, (5, 6)),
    ],
)
def test_image_size(record: dict[str, Any], size: tuple[int, int] | None) -> None:
    assert image_size(record) == size


def annotation(size: Any) -> Annotation:
    return Annotation(1, "a.png", "?", "x", "f.json:3", size, {})


def test_geometry() -> None:
    geometry = annotation((640, 480)).geometry
    assert (geometry.width, geometry.height) == (640, 480)
    with pytest.raises(DataError, match="f.json:3: the image size is needed"):
        _ = annotation(None).geometry
    for size in ((0, 5), (5, -1)):
        with pytest.raises(DataError, match=r"width and height must be positive, got \("):
            _ = annotation(size).geometry
