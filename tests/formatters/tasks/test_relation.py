from __future__ import annotations

from sphinxkit.formatters import tasks
from tests.formatters.tasks.faults import SQUARE, faults


def test_relations_have_two_sides() -> None:
    one = "<p>a</p>[0.1,0.2,0.3,0.4]"
    task = tasks.create("relation")
    assert faults(task.parse(one, SQUARE)) == ["wrong_count!"]
    three = task.parse(f"{one} {one} {one}", SQUARE)
    assert len(three.items) == 2
    assert faults(three) == ["wrong_count"]
