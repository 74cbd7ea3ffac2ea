from __future__ import annotations

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import GroundedPhrase
from tests.formatters.tasks.faults import GOOD, SQUARE, faults


def test_layout_names() -> None:
    task = tasks.create("layout", classes="doclaynet")
    text = "<p>list item</p>[0.1,0.2,0.3,0.4] <p>chapter</p>[0.1,0.2,0.3,0.4] <p>List-item</p>[0.1,0.2,0.3,0.4]"
    result = task.parse(text, SQUARE)
    assert result.items == (GroundedPhrase("List-item", (GOOD, GOOD)),)
    assert faults(result) == ["wording", "unknown_name!", "duplicate"]
    assert faults(task.parse("[0.1,0.2,0.3,0.4]", SQUARE)) == ["missing_phrase!"]
    assert faults(task.parse("no", SQUARE)) == ["extra_text", "empty!"]
