"""Conversations as text, and as token ids with a label on every token that is to be learnt.

The whole conversation is tokenised once. What is learnt is decided by the tokenizer's character spans, never by a
search for the answer's tokens: a search finds the wrong place when a question holds the answer's words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sphinxkit.errors import DataError
from sphinxkit.formatters.labels import IGNORE_INDEX

IMAGE_PLACEHOLDER = "<image>"
"""Marks an image in LLaVA-style data. Images stand in front of the text in SPHINX, so it is taken out."""

SPHINX_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""System text of ``sphinx_v1``. Source: LLaMA2-Accessory, accessory/conversation/lib.py (default conversation)."""

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


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


def clean_turn(content: str) -> str:
    """A turn's text without image placeholders and without the white space around it."""
    return content.replace(IMAGE_PLACEHOLDER, "").strip()


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
    """

    name: str
    system: str
    opening: str
    roles: Mapping[str, str]
    separator: str
    stop: tuple[str, ...]

    def render(self, messages: Sequence[Message], answer_start: str = "") -> RenderedConversation:
        """The conversation as one text, with the places of the answers.

        Args:
            messages: An optional system message, then user and assistant in turn. If the user has the last word, the
                text ends where the assistant's answer begins. Image placeholders and the white space around a message
                are taken out.
            answer_start: Words put into the assistant's mouth at the open answer (ScienceQA's "The answer is").
        Raises:
            DataError: No messages, a message that is not ``{"role", "content"}``, an unknown role, roles out of turn,
                empty content, or ``answer_start`` without an open answer.
        """
        if not messages:
            raise DataError("conversation: there are no messages")
        parts = [self.system, self.opening]
        length = len(self.system) + len(self.opening)
        spans = []
        expected = "user"
        for index, message in enumerate(messages):
            role, content = self._read(index, message)
            if role == "system" and index == 0:
                length += len(content) - len(self.system)
                parts[0] = content
                continue
            if role != expected:
                raise DataError(f"conversation: message {index} is the {role}'s, expected the {expected}'s")
            if not content:
                raise DataError(f"conversation: message {index} ({role}) is empty")
            expected = "assistant" if role == "user" else "user"
            start = length + len(self.roles[role])
            parts.append(f"{self.roles[role]} {content}{self.separator}")
            length += len(parts[-1])
            if role == "assistant":
                spans.append((start, length))
        if len(parts) == 2:
            raise DataError("conversation: there is only a system message")
        if expected == "assistant":
            start_words = answer_start.strip()
            parts.append(self.roles["assistant"] + (f" {start_words}" if start_words else ""))
        elif answer_start:
            raise DataError(f"conversation: answer_start {answer_start!r} needs the user to have the last word")
        return RenderedConversation("".join(parts), tuple(spans))

    @staticmethod
    def _read(index: int, message: Message) -> tuple[str, str]:
        try:
            role, content = message["role"], message["content"]
        except (KeyError, TypeError) as error:
            raise DataError(f"conversation: message {index} must have a role and a content, got {message!r}") from error
        if role not in ("system", "user", "assistant"):
            raise DataError(f"conversation: message {index} has role {role!r}, expected system, user or assistant")
        if not isinstance(content, str):
            raise DataError(f"conversation: message {index} ({role}) has a {type(content).__name__} as its content")
        return role, clean_turn(content)

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
        space before them and the separator after them, because that is what the model writes when it is asked. A token
        is learnt if the first character that it stands for lies in an answer's span: a token that begins before the
        answer belongs to the prompt, one that begins in it and reaches beyond belongs to the answer. Never learnt:
        end-of-sentence (the separator ends an answer) and the unknown token (the public implementation ignores its id).

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
        labels = [IGNORE_INDEX] * len(token_ids)
        spans = iter(rendered.answer_spans)
        span = next(spans, None)
        for position, (token, (start, _)) in enumerate(zip(ids, offsets, strict=True), start=1):
            while span is not None and start >= span[1]:
                span = next(spans, None)
            if span is None:
                break
            if start >= span[0] and token != tokenizer.unk_id:
                labels[position] = token
        length = len(token_ids) if max_tokens is None else max_tokens
        if all(label == IGNORE_INDEX for label in labels[:length]):
            cut = "" if length >= len(token_ids) else f" in the first {length} of {len(token_ids)} tokens"
            raise DataError(
                f"conversation: there is nothing to learn{cut}; {len(rendered.answer_spans)} answers in all"
            )
        return EncodedConversation(token_ids[:length], labels[:length], is_truncated=length < len(token_ids))


def sphinx_v1(system: str = SPHINX_SYSTEM) -> ConversationTemplate:
    """The template that SPHINX was trained with: turns that begin with ``### Human:`` and ``### Assistant:``.

    Args:
        system: System text.
    Source: LLaMA2-Accessory, accessory/conversation/lib.py (default conversation).
    """
    return ConversationTemplate(
        name="sphinx_v1",
        system=system,
        opening="\n\n###",
        roles={"user": " Human:", "assistant": " Assistant:"},
        separator="\n###",
        stop=("\n###",),
    )
