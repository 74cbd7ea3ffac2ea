from __future__ import annotations

import pytest

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.grounding import escape, unescape
from tests.formatters.tasks.faults import GOOD, SQUARE, faults


@pytest.mark.parametrize(
    ("text", "items", "kinds"),
    [
        ("<p>dog</p> [0.1,0.2,0.3,0.4]", ["dog"], ["spaces"]),
        ("<p>dog[0.1,0.2,0.3,0.4]", ["dog"], ["missing_close_tag"]),
        ("<p>dog[0.1,0.2,0.3,0.4]</p>", ["dog"], ["missing_close_tag", "missing_open_tag!"]),
        ("dog</p>[0.1,0.2,0.3,0.4]", ["dog"], ["missing_open_tag"]),
        ("< p >dog< /P>[0.1,0.2,0.3,0.4]", ["dog"], ["tag_spelling", "tag_spelling"]),
        ("<p>dog</p>0.1,0.2,0.3,0.4]", ["dog"], ["missing_open_bracket"]),
        ("dog: [0.1,0.2,0.3,0.4]", [""], ["extra_text", "missing_phrase"]),
        ("<p>dog</p>[[0.1,0.2,0.3,0.4],[0.1,0.2,0.3,0.4]]", ["dog"], ["doubled_bracket", "separator"]),
        ("<p>dog</p>[0.1,0.2,0.3,0.4] and a cat", ["dog"], ["extra_text"]),
        ("<p>dog</p>", [], ["no_coordinates!"]),
        ("<p>dog</p>[0.1,0.2]", [], ["wrong_count!"]),
        ("<p>dog", [], ["missing_close_tag!", "extra_text"]),
        ("<p>cat <p>dog</p>[0.1,0.2,0.3,0.4]", ["dog"], ["missing_close_tag!", "extra_text"]),
        ("none", [], ["extra_text", "empty!"]),
        ("", [], ["empty!"]),
    ],
)
def test_grounded_phrases(text: str, items: list[str], kinds: list[str]) -> None:
    result = tasks.create("detection").parse(text, SQUARE)
    assert [item.phrase for item in result.items] == items
    for item in result.items:
        assert set(item.boxes) == {GOOD}
    assert faults(result) == kinds


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain [text] <b> 3 < 4; [1] [x, y]", "plain [text] <b> 3 < 4; [1] [x, y]"),
        ("<p>", r"<\p>"),
        ("</p>", r"<\/p>"),
        (r"<\p>", r"<\\p>"),
        ("< P >", r"<\ P >"),
        ("[0.1,0.2", r"[\0.1,0.2"),
        (r"[\1 2", r"[\\1 2"),
        (r"C:\dir", r"C:\dir"),
    ],
)
def test_escaping(text: str, escaped: str) -> None:
    assert escape(text) == escaped
    assert unescape(escaped) == text
