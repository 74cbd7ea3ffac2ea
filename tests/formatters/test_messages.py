from __future__ import annotations

from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.formatters.messages import check_messages, clean_content

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": ""}


def test_image_placeholders_are_no_text() -> None:
    assert clean_content("<image>\n What is <image> it? ") == "What is  it?"


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], (USER, ASSISTANT)])
def test_conversations(messages: Any) -> None:
    check_messages(messages)
    check_messages(messages, last=messages[-1]["role"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "c: messages must be a list of .*, got str: 'Hi'"),
        (USER, "messages must be a list of .*, got dict"),
        ([], "c: there are no messages"),
        ([{"role": "user"}], "message 0 must have a role and a content"),
        (["Hi"], "message 0 must have a role and a content"),
        ([{"role": "bot", "content": "x"}], "message 0 has role 'bot', expected system, user or assistant"),
        ([{"role": "user", "content": None}], r"message 0 \(user\) has a NoneType as its content"),
        ([ASSISTANT], "message 0 is the assistant's, expected the user's"),
        ([USER, USER], "message 1 is the user's, expected the assistant's"),
        ([USER, SYSTEM], "message 1 is the system's, expected the assistant's"),
        ([{"role": "user", "content": "<image> "}], r"message 0 \(user\) is empty"),
        ([SYSTEM], "there is only a system message"),
        ([USER], "the last message is the user's, expected the assistant's"),
    ],
)
def test_what_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_messages(messages, "c", last="assistant")
