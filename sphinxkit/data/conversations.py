"""Conversations in LLaVA's JSON, and their token ids under a stated policy for over-long ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sphinxkit.data.samples import Sample
from sphinxkit.errors import DataError
from sphinxkit.formatters import (
    IMAGE_PLACEHOLDER,
    ConversationTemplate,
    EncodedConversation,
    Message,
    check_messages,
    label_text,
)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
IMAGE_PREFIX = f"{IMAGE_PLACEHOLDER}\n"  # LLaVA's mark in the first turn of a conversation about an image

OverLength = Literal["error", "truncate", "skip"]


class OverLengthError(DataError):
    """A sample is longer than allowed and the policy is to skip it."""


class TextTokenizer(Protocol):
    """What encoding needs of a tokenizer; ``sphinxkit.tokenizer.Tokenizer`` is one."""

    bos_id: int
    eos_id: int
    unk_id: int

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the characters that each covers."""
        ...


def read_conversation(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The messages of a record: LLaVA's ``conversations`` of {"from", "value"}, or ``messages`` of {"role", "content"}.

    Args:
        record: The record.
        where: "file:line", for messages.
    Returns:
        ``{"role", "content"}`` each: an optional system message, then user and assistant in turn.
    Raises:
        DataError: There are no messages, a speaker is unknown or out of turn, an answer or question is empty, or nobody
            answers.
    """
    keys = ("from", "value") if "conversations" in record else ("role", "content")
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'conversations' must be a list that is not empty, got {turns!r:.60}")
    messages = []
    for index, turn in enumerate(turns):
        speaker, content = (turn.get(key) for key in keys) if isinstance(turn, dict) else (None, None)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(content, str):
            raise DataError(f"{where}: message {index} must have {keys[0]!r} and {keys[1]!r}, got {turn!r:.80}")
        messages.append({"role": role, "content": content})
    check_messages(messages, where, last="assistant")
    return tuple(messages)


def write_conversation(
    sample_id: str, messages: Sequence[Message], *, image: str = "", task: str = ""
) -> dict[str, Any]:
    """A record in LLaVA's form, with ``<image>`` in front of the first question if there is an image.

    Args:
        sample_id: Unique within the file.
        messages: ``{"role", "content"}`` each.
        image: Path relative to the image folder, or "".
        task: Name of the task, or "".
    """
    record: dict[str, Any] = {"id": sample_id}
    if image:
        record["image"] = image
    if task:
        record["task"] = task
    turns = []
    is_marked = not image
    for message in messages:
        content = message["content"]
        if message["role"] == "user" and not is_marked:
            is_marked = True
            content = content if IMAGE_PLACEHOLDER in content else IMAGE_PREFIX + content
        turns.append({"from": SPEAKERS[message["role"]], "value": content})
    record["conversations"] = turns
    return record


def read_sample(record: Mapping[str, Any], sample_id: str, where: str, root: Path, task: str = "") -> Sample:
    """A record of a conversation file, or one of plain text ({"text": ...}), as a sample.

    Args:
        record: The record.
        sample_id: Names the sample in reports.
        where: "file:line".
        root: Folder that the record's ``image`` is relative to.
        task: For records that name none.
    Raises:
        DataError: As ``read_conversation``; or the text is empty, or ``image`` is not a path.
    """
    image = record.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise DataError(f"{where}: 'image' must be a path, got {image!r:.60}")
    path = root / image if isinstance(image, str) else None
    name = str(record.get("task") or task)
    if "text" in record and "conversations" not in record and "messages" not in record:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: 'text' must be a text that is not empty, got {text!r:.60}")
        return Sample(sample_id, name, (), text, path, where)
    return Sample(sample_id, name, read_conversation(record, where), "", path, where)


def encode_sample(
    sample: Sample,
    template: ConversationTemplate,
    tokenizer: TextTokenizer,
    max_tokens: int | None = None,
    over_length: OverLength = "error",
) -> EncodedConversation:
    """Token ids and labels of a sample. Plain text is learnt whole, from its first token to the end-of-sentence.

    Args:
        sample: The sample.
        template: How conversations are written down.
        tokenizer: With character spans.
        max_tokens: The longest that is allowed (image tokens not counted); None: any length.
        over_length: What happens to a longer one: ``error`` (a bad sample), ``truncate`` (cut at the end; flagged in
            ``is_truncated``), ``skip`` (left out and counted apart).
    Raises:
        OverLengthError: Too long, ``skip``.
        DataError: Too long, ``error``; or nothing to learn is left; names the sample.
    """
    limit = max_tokens if over_length == "truncate" else None
    try:
        if sample.messages:
            encoded = template.encode(sample.messages, tokenizer, limit)
        else:
            ids = tokenizer.encode(sample.text, bos=True, eos=True)
            labels = label_text(ids)
            encoded = EncodedConversation(
                ids[:limit], labels[:limit], is_truncated=limit is not None and len(ids) > limit
            )
    except DataError as error:
        raise DataError(f"sample {sample.id}: {error}") from error
    if max_tokens is not None and len(encoded.token_ids) > max_tokens:
        kind = OverLengthError if over_length == "skip" else DataError
        raise kind(f"sample {sample.id}: {len(encoded.token_ids)} tokens, at most {max_tokens} are allowed")
    return encoded
