r"""The markup of grounded answers, ``<p>phrase</p>[x1,y1,x2,y2;...]``: writing it and finding it in a model's answer.

Words that look like markup themselves are written with a backslash inside (``<\p>``, ``[\0.1,0.2``) and get it taken
away when they are read, so any phrase can be written. Ordinary text is written as it is.
Source: SPHINX, arXiv:2311.07575, section 3.3 (grounded captions); the backslash is our choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, GroundedPhrase, ParseResult
from sphinxkit.formatters.tasks.coordinates import is_empty, read_boxes, write_boxes
from sphinxkit.geometry import Box, ImageGeometry

# What a model may write for a tag, behind "<". Every repeat is bounded or possessive: the search stays linear.
_TAG = r"\s{0,2}/?\s{0,2}[pP]\s{0,2}>"
# What may be coordinates, behind "[": a number, a separator and the start of another number.
_LIST = r"\s{0,4}[-+.0-9][-+.0-9eE]{0,32}[,;\s]{1,8}[-+.0-9]"
_ESCAPE = re.compile(rf"<(?=\\*+{_TAG})|\[(?=\\*+{_LIST})")
_UNESCAPE = re.compile(rf"<\\(?=\\*+{_TAG})|\[\\(?=\\*+{_LIST})")
_MARKUP = re.compile(rf"<{_TAG}|\[(?={_LIST})")
# A group without any error, and nothing behind it that could belong to it: most of a good answer, and quickly read.
_PERFECT = re.compile(r"<p>([^<>\[\]\\]++)</p>\[([0-9.,;]*+)\](?![\s,;]{0,4}\[)")
_OPEN_LIST = re.compile(r"\s*+\[[\[\s]*+")
_NEXT_LIST = re.compile(rf"[\s,;]{{0,4}}\[(?={_LIST})")
_LIST_END = re.compile(r"[\[\]<]")
_LIST_BODY = re.compile(r"(?:[-+.0-9]++(?:[eE][-+]?[0-9]+)?|[,;\s]++)*+")
_CLOSING = re.compile(r"(?:\s*+\])*+")


def escape(text: str) -> str:
    """Escape text for a grounded answer: a backslash goes into everything that looks like markup."""
    return _ESCAPE.sub(lambda match: match.group() + "\\", text)


def unescape(text: str) -> str:
    """Undo ``escape``."""
    return _UNESCAPE.sub(lambda match: match.group()[0], text)


def write_phrase(task: str, phrase: str, coordinates: str) -> str:
    """``<p>phrase</p>`` and its coordinates, which come with their brackets.

    Raises:
        DataError: The phrase is empty.
    """
    if not phrase.strip():
        raise DataError(f"task {task!r}: a phrase is empty")
    return f"<p>{escape(phrase)}</p>{coordinates}"


def write_grounded(task: str, phrase: GroundedPhrase, geometry: ImageGeometry) -> str:
    """``<p>phrase</p>[x1,y1,x2,y2;...]``.

    Raises:
        DataError: The phrase is empty, or a box is not inside the image.
    """
    return write_phrase(task, phrase.phrase, write_boxes(task, phrase.boxes, geometry))


class Group(NamedTuple):
    """A phrase with its coordinates, as found in an answer.

    Args:
        phrase: The words, or None where there are only coordinates.
        start: Where the group begins in the answer.
        end: Where it ends.
        lists: Start and end of what stands between each pair of brackets; one pair in a perfect answer.
        text_before: The plain text between the previous group and this one.
    """

    phrase: str | None
    start: int
    end: int
    lists: tuple[tuple[int, int], ...]
    text_before: str


class Scanner:
    """Finds the groups of an answer from left to right, in one pass.

    Args:
        log: Holds the answer and takes the errors.
        running_text: Words between the groups belong to the answer (a caption); else they are an error.
    """

    def __init__(self, log: ErrorLog, running_text: bool) -> None:
        self.text_after = ""
        """The plain text behind the last group, once all have been found."""
        self._log = log
        self._text = log.text
        self._running_text = running_text
        self._done = 0  # all text before this place is in a group or in _plain
        self._plain: list[str] = []  # plain text since the last group, still escaped
        self._plain_start = 0
        self._opened: tuple[int, int] | None = None  # an open <p>: its place and where its phrase begins
        self._found: Group | None = None

    def groups(self) -> Iterator[Group]:
        """Find the groups one by one, to the end of the answer or until the log is full."""
        while not self._log.is_full and (match := _MARKUP.search(self._text, self._done)):
            start, end = match.span()
            if self._opened is None and (perfect := _PERFECT.match(self._text, start)):
                self._move_to_plain(start, start)
                self._add(perfect.group(1), start, perfect.end(), (perfect.span(2),))
            else:
                self._read_markup(start, end, match.group())
            if self._found is not None:
                yield self._found
                self._found = None
        self._drop_open_tag(len(self._text))
        self._move_to_plain(len(self._text), len(self._text))
        self.text_after = self._take_plain()

    def _read_markup(self, start: int, end: int, markup: str) -> None:
        if markup == "[":
            self._coordinates_in_place(start)
            return
        if markup not in ("<p>", "</p>"):
            self._log.add("tag_spelling", start, end, is_repaired=True)
        if "/" in markup:
            self._close(start, end)
        else:
            self._drop_open_tag(start)
            self._move_to_plain(start, end)
            self._opened = (start, end)

    def _move_to_plain(self, end: int, resume: int) -> None:
        self._plain.append(self._text[self._done : end])
        self._done = resume

    def _take_plain(self) -> str:
        raw = "".join(self._plain)
        self._plain = []
        if not self._running_text and raw.strip():
            start = self._plain_start
            self._log.add("extra_text", start, start + len(raw), is_repaired=True)
        return unescape(raw)

    def _add(self, phrase: str | None, start: int, end: int, lists: tuple[tuple[int, int], ...]) -> None:
        before = self._take_plain()
        self._found = Group(None if phrase is None else unescape(phrase), start, end, lists, before)
        self._done = self._plain_start = end
        self._opened = None

    def _drop_open_tag(self, end: int) -> None:
        if self._opened is not None:  # its words stay plain text
            self._log.add("missing_close_tag", self._opened[0], end, is_repaired=False)
            self._opened = None

    def _coordinates_in_place(self, start: int) -> None:
        """Coordinates that follow no closing tag."""
        outer = start
        while outer > self._done and self._text[outer - 1] in "[ \n\t":
            outer -= 1
        start = self._text.index("[", outer)  # "[[0.1,...": from the first bracket
        if self._opened is not None:
            group_start, begin = self._opened
            self._log.add("missing_close_tag", group_start, start, is_repaired=True)
            lists, end = self._lists(start)
            self._add(self._text[begin:start].strip(), group_start, end, lists)
        else:
            self._move_to_plain(start, start)
            lists, end = self._lists(start)
            self._add(None, start, end, lists)

    def _close(self, start: int, end: int) -> None:
        if self._opened is not None:
            group_start, begin = self._opened
            phrase = self._text[begin:start]
        else:
            begin = self._done
            phrase = self._text[begin:start].strip()
            self._log.add("missing_open_tag", begin, end, is_repaired=bool(phrase))
            if not phrase:
                self._move_to_plain(start, end)
                return
            group_start = self._text.index(phrase, begin)
            self._move_to_plain(group_start, group_start)
        lists, stop = self._due_lists(end)
        if not lists:
            self._log.add("no_coordinates", group_start, end, is_repaired=False)
            if self._running_text:  # the words are part of the caption all the same
                self._plain.append(phrase)
                self._done, self._opened = end, None
                return
        self._add(phrase, group_start, stop, lists)

    def _due_lists(self, start: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """The coordinates that are due behind a closing tag, and where they end."""
        text = self._text
        if match := _OPEN_LIST.match(text, start):
            if text[start] != "[":
                self._log.add("spaces", start, match.end(), is_repaired=True)
            return self._lists(text.index("[", start))
        body = _LIST_BODY.match(text, start)
        end = body.end() if body else start
        if text[start:end].strip() and text[end : end + 1] == "]":
            self._log.add("missing_open_bracket", start, end + 1, is_repaired=True)
            return ((start, end),), end + 1
        return (), start

    def _lists(self, start: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """The insides of the brackets that open at ``start``, and where the last one ends."""
        text = self._text
        lists: list[tuple[int, int]] = []
        end = start
        opening = _OPEN_LIST.match(text, start)
        is_nested = False
        while opening is not None:
            is_doubled = opening.group().count("[") > 1
            is_nested |= is_doubled
            begin = opening.end() if is_doubled else text.index("[", opening.start()) + 1
            if is_doubled:
                self._log.add("doubled_bracket", opening.start(), begin, is_repaired=True)
            stop = _LIST_END.search(text, begin)
            if stop is not None and stop.group() == "]":
                lists.append((begin, stop.start()))
                end = stop.end()
            else:
                body = _LIST_BODY.match(text, begin)
                end = begin + len(body.group().rstrip()) if body else begin
                self._log.add("missing_close_bracket", start, end, is_repaired=True)
                lists.append((begin, end))
            opening = None
            if following := _NEXT_LIST.match(text, end):  # one bracket for each box
                self._log.add("separator", end, following.end(), is_repaired=True)
                opening = _OPEN_LIST.match(text, following.end() - 1)
            elif is_nested and (closing := _CLOSING.match(text, end)):
                end = closing.end()
        return tuple(lists), end


def read_group(
    log: ErrorLog, group: Group, geometry: ImageGeometry, allow_none: bool = False
) -> tuple[Box, ...] | None:
    """The boxes of a group in original pixels; None if there is not one.

    Args:
        log: Holds the answer and takes the errors.
        group: As found.
        geometry: The image's size.
        allow_none: An empty list (``[]``) says that there are no boxes, and gives ().
    """
    boxes: list[Box] = []
    for start, end in group.lists:
        boxes += read_boxes(log, start, end, geometry)
    if boxes:
        return tuple(boxes)
    if group.lists and all(is_empty(log.text[start:end]) for start, end in group.lists):
        if allow_none:
            return ()
        log.add("no_coordinates", group.start, group.end, is_repaired=False)
    return None


def read_grounded(
    log: ErrorLog, geometry: ImageGeometry, running_text: bool = False, allow_none: bool = False
) -> ParseResult[GroundedPhrase]:
    """Read an answer of phrases with boxes.

    Coordinates without a phrase give an item with an empty one; in running text they give none.

    Args:
        log: Holds the answer and takes the errors.
        geometry: The image's size.
        running_text: See ``Scanner``; then the items say where in the plain text they begin.
        allow_none: See ``read_group``.
    """
    scanner = Scanner(log, running_text)
    items: list[GroundedPhrase] = []
    plain: list[str] = []
    length = 0
    for group in scanner.groups():
        before = group.text_before if plain else group.text_before.lstrip()
        phrase = group.phrase or ""
        start = length + len(before)
        length = start + len(phrase)
        plain += [before, phrase]
        if group.phrase is None:
            log.add("missing_phrase", group.start, group.end, is_repaired=not running_text)
            if running_text:
                continue
        boxes = read_group(log, group, geometry, allow_none)
        if boxes is not None:
            items.append(GroundedPhrase(phrase, boxes, start if running_text else None))
    text = "".join([*plain, scanner.text_after])
    return ParseResult(tuple(items), tuple(log.errors), text.rstrip() if plain else text.strip())
