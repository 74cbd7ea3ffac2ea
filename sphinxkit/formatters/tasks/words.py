"""Parses plain-text answers."""

from __future__ import annotations

from sphinxkit.formatters.tasks.base import ErrorLog, ParseResult


def read_words(text: str) -> ParseResult[str]:
    """The answer without the white space around it; an empty one is a failure."""
    words = text.strip()
    if words:
        return ParseResult((words,), (), words)
    log = ErrorLog(text)
    log.add("empty", 0, len(text), is_repaired=False)
    return ParseResult((), tuple(log.errors))
