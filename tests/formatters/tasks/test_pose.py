from __future__ import annotations

from sphinxkit.formatters import tasks
from sphinxkit.geometry import Point
from tests.formatters.tasks.faults import SQUARE, WIDE, faults


def test_key_points() -> None:
    task = tasks.create("pose")
    text = (
        "<p>Left Eye</p>[0.1,0.2] <p>tail</p>[0.1,0.2] <p>left_eye</p>[0.3,0.3] <p>nose</p>[0.1,0.2;0.3,0.4] "
        "[0.5,0.5] <p>left_hip</p>[0.1]"
    )
    result = task.parse(text, SQUARE)
    assert [dict(item.points) for item in result.items] == [{"left_eye": Point(100.0, 200.0)}]
    # the stray pair is taken for a second point of the nose
    assert faults(result) == ["wording", "unknown_name!", "duplicate!", "separator", "wrong_count!", "wrong_count!"]
    near = task.parse("<p>nose</p>[0.500,0.200]", WIDE)  # 50 pixels above the image
    assert near.items[0].points == {"nose": Point(500.0, 0.0)}
    assert faults(near) == ["clipped"]
    assert faults(task.parse("<p>nose</p>[0.500,0.100]", WIDE)) == ["outside_image!"]
    assert faults(task.parse("[0.1,0.2]", SQUARE)) == ["missing_phrase!"]
    assert faults(task.parse("", SQUARE)) == ["empty!"]
