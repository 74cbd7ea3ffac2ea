from __future__ import annotations

import pytest

from sphinxkit.formatters import tasks
from tests.formatters.tasks.faults import faults


@pytest.mark.parametrize(
    ("text", "label", "kinds"),
    [
        ("tabby cat", "tabby cat", ["wording"]),
        ("This is an owl.", "owl", ["wording"]),
        ("It is the sea", "sea", ["wording"]),
        ("This is a cat", "cat", ["wording"]),
        (".", None, ["empty!"]),
        ("", None, ["empty!"]),
    ],
)
def test_labels(text: str, label: str | None, kinds: list[str]) -> None:
    result = tasks.create("classification").parse(text)
    assert result.items == ((label,) if label else ())
    assert faults(result) == kinds
