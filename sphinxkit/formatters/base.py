"""Conversation templates: messages as text, and as token ids with a label on every token that is to be learnt.

The whole conversation is tokenised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sphinxkit.errors import DataError
from sphinxkit.formatters.coordinate_grid import move_to_grid
from sphinxkit.formatters.labels import IGNORE_INDEX, label_spans
from sphinxkit.formatters.messages import Message, check_messages, clean_content
from sphinxkit.registry import Registry


class OffsetTokenizer(Protocol):
    """What labels need of a tokenizer; ``sphinxkit.tokenizer.Tokenizer`` is one."""

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
        text: All of it.
        answer_spans: Characters (start, end) of ``text`` that each answer has the model write: from the space after
            the role to the end of the separator.
    """

    text: str
    answer_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as token ids.

    Args:
        token_ids: Beginning-of-sentence, the text, end-of-sentence; cut at ``max_tokens``.
        labels: As long as ``token_ids`` and aligned to them (not shifted): the id where it is learnt, else
            ``IGNORE_INDEX``.
        is_truncated: Whether ``max_tokens`` cut something off.
    """

    token_ids: list[int]
    labels: list[int]
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class ConversationTemplate:
    """How a conversation is written down.

    The text is ``system + opening``, then for each message ``role + " " + content + separator``; where the model is to
    answer, the text ends with the assistant's role and no space (the space belongs to the answer's first token).

    Args:
        name: Its registered name.
        system: System text; a system message replaces it.
        opening: Between the system text and the first role.
        roles: What stands before a user's and an assistant's message, by "user" and "assistant".
        separator: After every message.
        stop: Strings that end an answer.
        coordinate_grid: Coordinates in a user's message are rounded to whole steps of 1/``coordinate_grid`` of the
            padded square's side; None: they stay as they are.
    Raises:
        DataError: ``coordinate_grid`` is below 1.
    """

    name: str
    system: str
    opening: str
    roles: Mapping[str, str]
    separator: str
    stop: tuple[str, ...]
    coordinate_grid: int | None = None

    def __post_init__(self) -> None:
        if self.coordinate_grid is not None and self.coordinate_grid < 1:
            raise DataError(f"conversation: coordinate_grid must be at least 1, or None; got {self.coordinate_grid}")

    def render(self, messages: Sequence[Message], answer_start: str = "") -> RenderedConversation:
        """The conversation as one text, with the places of the answers.

        Args:
            messages: An optional system message, then user and assistant in turn. If the last message is the user's,
                the text ends where the assistant's answer begins. Image placeholders and the white space around a
                message are taken out.
            answer_start: The first words of the open answer (ScienceQA's "The answer is").
        Raises:
            DataError: No messages, a message that is not ``{"role", "content"}``, an unknown role, roles out of turn,
                empty content, or ``answer_start`` without an open answer.
        """
        check_messages(messages)
        parts = [self.system, self.opening]
        length = len(self.system) + len(self.opening)
        spans = []
        for message in messages:
            role, content = message["role"], clean_content(message["content"])
            if role == "system":
                length += len(content) - len(self.system)
                parts[0] = content
                continue
            if role == "user" and self.coordinate_grid is not None:
                content = move_to_grid(content, self.coordinate_grid)
            start = length + len(self.roles[role])
            parts.append(f"{self.roles[role]} {content}{self.separator}")
            length += len(parts[-1])
            if role == "assistant":
                spans.append((start, length))
        if messages[-1]["role"] == "user":
            start_words = answer_start.strip()
            parts.append(self.roles["assistant"] + (f" {start_words}" if start_words else ""))
        elif answer_start:
            raise DataError(f"conversation: answer_start {answer_start!r} needs a last message of the user")
        return RenderedConversation("".join(parts), tuple(spans))

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

        The ids are those of the whole text between beginning- and end-of-sentence. An answer's span is its words, the
        space before them and the separator after them, because that is what the model writes when it is asked; see
        ``labels.label_spans``. End-of-sentence is never learnt: the separator ends an answer.

        Args:
            messages: See ``render``. An open answer at the end is allowed and teaches nothing.
            tokenizer: With character spans.
            max_tokens: Cut ids and labels to this many; ``None``: keep all.
        Raises:
            DataError: As ``render``; or nothing to learn is left.
        Source: LLaMA2-Accessory, accessory/conversation/dataset.py, whose labels these are except that it labels a
            question that ends with the answer's words.
        """
        rendered = self.render(messages)
        ids, offsets = tokenizer.encode_with_offsets(rendered.text)
        token_ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        answers = label_spans(ids, offsets, rendered.answer_spans, tokenizer.unk_id)
        labels = [IGNORE_INDEX, *answers, IGNORE_INDEX]
        length = len(token_ids) if max_tokens is None else max_tokens
        if all(label == IGNORE_INDEX for label in labels[:length]):
            cut = "" if length >= len(token_ids) else f" in the first {length} of {len(token_ids)} tokens"
            raise DataError(
                f"conversation: there is nothing to learn{cut}; {len(rendered.answer_spans)} answers in all"
            )
        return EncodedConversation(token_ids[:length], labels[:length], is_truncated=length < len(token_ids))


registry: Registry[ConversationTemplate] = Registry("conversation")
register = registry.register
create = registry.build
names = registry.names
