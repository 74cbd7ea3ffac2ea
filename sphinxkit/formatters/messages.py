"""Messages of a conversation, and the check of their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from sphinxkit.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
"""Marks an image in LLaVA-style data. Images stand in front of the text in SPHINX, so it is taken out."""

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


def clean_content(content: str) -> str:
    """A message's text without image placeholders and without the white space around it."""
    return content.replace(IMAGE_PLACEHOLDER, "").strip()


def check_messages(
    messages: Sequence[Message],
    where: str = "conversation",
    *,
    last: Literal["user", "assistant"] | None = None,
) -> None:
    """Check the messages of a conversation: an optional system message, then user and assistant in turn.

    Args:
        messages: ``{"role", "content"}`` each.
        where: Names the conversation in error messages.
        last: Required role of the last message; None: any.
    Raises:
        DataError: No messages, a message that is not ``{"role", "content"}``, an unknown role, roles out of turn, empty
            content (of a system message it may be), only a system message, or the wrong last message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        got = type(messages).__name__
        raise DataError(
            f'{where}: messages must be a list of {{"role": ..., "content": ...}}, got {got}: {messages!r:.60}'
        )
    if not messages:
        raise DataError(f"{where}: there are no messages")
    expected = "user"
    for index, message in enumerate(messages):
        try:
            role, content = message["role"], message["content"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: message {index} must have a role and a content, got {message!r:.80}") from error
        if role not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {index} has role {role!r:.40}, expected system, user or assistant")
        if not isinstance(content, str):
            raise DataError(f"{where}: message {index} ({role}) has a {type(content).__name__} as its content")
        if role == "system" and index == 0:
            continue
        if role != expected:
            raise DataError(f"{where}: message {index} is the {role}'s, expected the {expected}'s")
        if not clean_content(content):
            raise DataError(f"{where}: message {index} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"
    found = messages[-1]["role"]
    if found == "system":
        raise DataError(f"{where}: there is only a system message")
    if last is not None and found != last:
        raise DataError(f"{where}: the last message is the {found}'s, expected the {last}'s")
