"""Conversation templates: messages to text, and to token ids with labels.

A conversation is tokenised as a whole, once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sphinxkit.errors import DataError
from sphinxkit.formatters.coordinate_grid import move_to_grid
from sphinxkit.formatters.labels import IGNORE_INDEX, label_spans
from sphinxkit.formatters.messages import Message, check_messages, clean_content
from sphinxkit.registry import Registry


class OffsetTokenizer(Protocol):
    """Tokenizer protocol for labels; ``sphinxkit.tokenizer.Tokenizer`` implements it."""

    bos_id: int
    eos_id: int
    unk_id: int

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of ``text`` and the characters, start and end, that each covers."""
        ...


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A conversation as one text.

    Args:
        text: The full text.
        answer_spans: Characters (start, end) of ``text`` that the model writes for each answer: from the space after
            the role to the end of the separator.
    """

    text: str
    answer_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as token ids.

    Args:
        token_ids: Beginning-of-sentence, the text, for some templates end-of-sentence; cut at ``max_tokens``.
        labels: As long as ``token_ids`` and aligned to them (not shifted): the token id if it is in the loss, else
            ``IGNORE_INDEX``.
        is_truncated: Whether ``max_tokens`` truncated the text.
    """

    token_ids: list[int]
    labels: list[int]
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class ConversationTemplate:
    """A conversation template: writes messages as text.

    The text is ``system + opening``, then for each message ``role + gap + content + separator + tail``; to prompt an
    answer, the text ends with the assistant's role and no gap (the space belongs to the answer's first token).

    Args:
        name: Registered name.
        system: System text; a system message replaces it.
        opening: Text between the system text and the first role.
        roles: Text before a message, by "user" and "assistant".
        separator: Text after every message; the model writes it to end an answer.
        stop: Strings that end an answer.
        coordinate_grid: Coordinates in a user's message are rounded to whole steps of 1/``coordinate_grid`` of the
            padded square's side; None: unchanged.
        low_confidence: Answers whose mean log-probability is below it are marked as uncertain; None: none are.
        gap: Text between a role and its message; before an answer the model writes it.
        user_separator: Text after a user's message; None: ``separator``.
        tail: Text after every separator; the model does not write it.
        system_frame: Text before and after a system text; None: no system text is allowed.
        specials: Strings for the tokenizer's end-of-sentence token, even if the tokenizer would split them.
        ends_with_eos: Whether training appends end-of-sentence to the conversation; it has no loss.
    Raises:
        DataError: ``coordinate_grid`` is below 1, or ``low_confidence`` above 0.
    """

    name: str
    system: str
    opening: str
    roles: Mapping[str, str]
    separator: str
    stop: tuple[str, ...]
    coordinate_grid: int | None = None
    low_confidence: float | None = None
    gap: str = " "
    user_separator: str | None = None
    tail: str = ""
    system_frame: tuple[str, str] | None = ("", "")
    specials: tuple[str, ...] = ()
    ends_with_eos: bool = True

    def __post_init__(self) -> None:
        if self.coordinate_grid is not None and self.coordinate_grid < 1:
            raise DataError(f"conversation: coordinate_grid must be at least 1, or None; got {self.coordinate_grid}")
        if self.low_confidence is not None and not self.low_confidence <= 0:
            raise DataError(
                f"conversation: low_confidence is a mean log-probability, at most 0, or None; got {self.low_confidence}"
            )

    def render(self, messages: Sequence[Message], answer_start: str = "") -> RenderedConversation:
        """Render the conversation as one text, with the answers' spans.

        Args:
            messages: An optional system message, then user and assistant in turn. If the last message is the user's,
                the text ends where the assistant's answer begins. Image placeholders and white space around a message
                are removed.
            answer_start: Beginning of the open answer (ScienceQA's "The answer is").
        Raises:
            DataError: No messages, a message that is not ``{"role", "content"}``, an unknown role, roles out of turn,
                empty content, or ``answer_start`` without an open answer.
        """
        check_messages(messages)
        given = messages[0]["role"] == "system"
        text = self._system_text(clean_content(messages[0]["content"]) if given else self.system) + self.opening
        spans = []
        for message in messages[1:] if given else messages:
            role, content = message["role"], self._content(message)
            start = len(text) + len(self.roles[role])
            is_user = role == "user" and self.user_separator is not None
            text += f"{self.roles[role]}{self.gap}{content}{self.user_separator if is_user else self.separator}"
            if role == "assistant":
                spans.append((start, len(text)))
            text += "" if is_user else self.tail
        return self._open(RenderedConversation(text, tuple(spans)), messages, answer_start)

    def _content(self, message: Message) -> str:
        content = clean_content(message["content"])
        is_moved = message["role"] == "user" and self.coordinate_grid is not None
        return move_to_grid(content, self.coordinate_grid) if is_moved and self.coordinate_grid else content

    def _system_text(self, system: str) -> str:
        if system and self.system_frame is None:
            raise DataError(f"conversation: template {self.name!r} has no place for a system text")
        return system.join(self.system_frame) if system and self.system_frame is not None else system

    def _open(
        self, rendered: RenderedConversation, messages: Sequence[Message], answer_start: str
    ) -> RenderedConversation:
        """With the beginning of the answer, where the user has the last word."""
        words = answer_start.strip()
        if messages[-1]["role"] != "user":
            if answer_start:
                raise DataError(f"conversation: answer_start {answer_start!r} needs a last message of the user")
            return rendered
        start = self.roles["assistant"] + (f"{self.gap}{words}" if words else "")
        return RenderedConversation(rendered.text + start, rendered.answer_spans)

    def prompt(self, messages: Sequence[Message], answer_start: str = "") -> str:
        """The conversation as text; see ``render``.

        Raises:
            DataError: As ``render``.
        """
        return self.render(messages, answer_start).text

    def encode(
        self, messages: Sequence[Message], tokenizer: OffsetTokenizer, max_tokens: int | None = None
    ) -> EncodedConversation:
        """Token ids and labels for training.

        The ids are beginning-of-sentence, the whole text, and end-of-sentence if the template has it. An answer's span
        is the text that the model writes: the space, the words and the separator; see ``labels.label_spans``.
        End-of-sentence has no loss, because the separator ends an answer.

        Args:
            messages: See ``render``. An open answer at the end is allowed and has no loss.
            tokenizer: With character spans.
            max_tokens: Cut ids and labels to this many; ``None``: keep all.
        Raises:
            DataError: As ``render``; or no labelled token is left.
        Source: LLaMA2-Accessory, accessory/conversation/dataset.py, whose labels these are except that it labels a
            question that ends with the answer's words.
        """
        rendered = self.render(messages)
        ids, offsets = self.encode_text(rendered.text, tokenizer)
        begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
        end = [tokenizer.eos_id] if self.ends_with_eos else []
        token_ids = [*begin, *ids, *end]
        answers = label_spans(ids, offsets, rendered.answer_spans, tokenizer.unk_id)
        labels = [*[IGNORE_INDEX] * len(begin), *answers, *[IGNORE_INDEX] * len(end)]
        length = len(token_ids) if max_tokens is None else max_tokens
        if all(label == IGNORE_INDEX for label in labels[:length]):
            cut = "" if length >= len(token_ids) else f" in the first {length} of {len(token_ids)} tokens"
            raise DataError(
                f"conversation: there is nothing to learn{cut}; {len(rendered.answer_spans)} answers in all"
            )
        return EncodedConversation(token_ids[:length], labels[:length], is_truncated=length < len(token_ids))

    def encode_text(self, text: str, tokenizer: OffsetTokenizer) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text of this template, and the characters that each covers.

        Args:
            text: From ``render``.
            tokenizer: One that spells ``specials`` (SentencePiece's do) gets the text around them piece by piece, and
                its end-of-sentence in their place, as transformers does.
        """
        ids, offsets = tokenizer.encode_with_offsets(text)
        spelt = [special for special in self.specials if special in text and tokenizer.eos_id not in ids]
        if not spelt:
            return ids, offsets
        ids, offsets, start = [], [], 0
        for piece in re.split(f"({'|'.join(map(re.escape, spelt))})", text):
            if piece in spelt:
                found, spans = [tokenizer.eos_id], [(0, len(piece))]
            else:
                found, spans = tokenizer.encode_with_offsets(piece)
            ids += found
            offsets += [(start + first, start + last) for first, last in spans]
            start += len(piece)
        return ids, offsets


registry: Registry[ConversationTemplate] = Registry("conversation")
register = registry.register
create = registry.build
names = registry.names
