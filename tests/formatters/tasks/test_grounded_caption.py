from __future__ import annotations

import pytest

from sphinxkit.formatters import tasks
from tests.formatters.tasks.faults import SQUARE, faults


@pytest.mark.parametrize(
    ("text", "plain", "items", "kinds"),
    [
        ("A <p>dog</p> runs.", "A dog runs.", [], ["no_coordinates!"]),
        ("A <p>dog runs.", "A dog runs.", [], ["missing_close_tag!"]),
        ("A dog</p>[0.1,0.2,0.3,0.4] runs.", "A dog runs.", [("A dog", 0)], ["missing_open_tag"]),
        ("A dog[0.1,0.2,0.3,0.4] runs.", "A dog runs.", [], ["missing_phrase!"]),
        ("A <p>dog[0.1,0.2,0.3,0.4] runs.", "A dog runs.", [("dog", 2)], ["missing_close_tag"]),
        ("A <p>dog</p>[] runs.", "A dog runs.", [], ["no_coordinates!"]),
        ("A <p>dog</p>[;] runs.", "A dog runs.", [], ["separator", "separator", "no_coordinates!"]),
        ("", "", [], ["empty!"]),
    ],
)
def test_grounded_captions(text: str, plain: str, items: list[tuple[str, int]], kinds: list[str]) -> None:
    result = tasks.create("grounded_caption").parse(text, SQUARE)
    assert result.text == plain
    assert [(item.phrase, item.start) for item in result.items] == items
    assert faults(result) == kinds
