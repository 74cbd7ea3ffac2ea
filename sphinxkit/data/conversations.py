"""Reads conversations in LLaVA's JSON and encodes them, with a policy for over-long ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sphinxkit.data.permutation import derive_key
from sphinxkit.data.samples import Sample, StoredImage
from sphinxkit.errors import DataError
from sphinxkit.formatters import (
    IMAGE_PLACEHOLDER,
    ConversationTemplate,
    EncodedConversation,
    Message,
    check_messages,
    clean_content,
    label_text,
    tasks,
)
from sphinxkit.tilers import image_below

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),  # ShareGPT's
}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
IMAGE_PREFIX = f"{IMAGE_PLACEHOLDER}\n"  # LLaVA's mark in the first turn of a conversation about an image

_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_OTHER_NAMES = ("image_path", "image_paths", "image_file", "image_url", "image_urls", "img")
_OTHER_MARKS = re.compile(r"\A\s*<(?:video|audio)>|<(?:video|audio)>\s*\Z|<img>.*?</img>", re.DOTALL)
"""Marks of a video, and Qwen-VL's of an image's path. Between other words they may be talk about HTML."""

CAPTION_TASKS = ("caption", "detailed_caption")

OverLength = Literal["error", "truncate", "skip", "continue"]


class OverLengthError(DataError):
    """A sample is longer than allowed and the policy is to skip it."""


class TextTokenizer(Protocol):
    """Tokenizer protocol for encoding; ``sphinxkit.tokenizer.Tokenizer`` implements it."""

    bos_id: int
    eos_id: int
    unk_id: int

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the (start, end) characters of each token."""
        ...


def trim_turns(messages: Sequence[Message]) -> list[Message]:
    """A conversation from its first question to its last answer; turns outside and empty ones at the ends go.

    Args:
        messages: ``{"role", "content"}`` each; a system message at the start stays.
    """
    system = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    said = [message["role"] if clean_content(message["content"]) else "" for message in turns]
    start = said.index("user") if "user" in said else len(turns)
    end = max((index + 1 for index, role in enumerate(said) if role == "assistant"), default=0)
    return [*system, *turns[start:end]]


def read_conversation(record: Mapping[str, Any], where: str, *, trim: bool = False) -> tuple[Message, ...]:
    """The messages of a record: LLaVA's ``conversations`` of {"from", "value"}, or ``messages`` of {"role", "content"}.

    Args:
        record: The record.
        where: "file:line", for messages.
        trim: See ``trim_turns``; False: such turns are errors.
    Returns:
        Messages ``{"role", "content"}``: an optional system message, then user and assistant alternating.
    Raises:
        DataError: There are no messages, a role is unknown or out of order, a question or answer is empty, or there is
            no answer.
    """
    keys = ("from", "value") if "conversations" in record else ("role", "content")
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'conversations' must be a list that is not empty, got {turns!r:.60}")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        speaker, content = (turn.get(key) for key in keys) if isinstance(turn, dict) else (None, None)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(content, str):
            raise DataError(f"{where}: message {index} must have {keys[0]!r} and {keys[1]!r}, got {turn!r:.80}")
        messages.append({"role": role, "content": content})
    if trim and not (messages := trim_turns(messages)):
        raise DataError(f"{where}: no question of 'conversations' has an answer")
    check_messages(messages, where, last="assistant")
    return tuple(messages)


def read_image(record: Mapping[str, Any], where: str) -> str:
    """The path of a record's image, or "" for a text: ``image`` or ``images``, a path or a list of one.

    Args:
        record: The record.
        where: "file:line", for messages.
    Raises:
        DataError: There is more than one image, a value that is not a path, a video or a sound, or an image under
            another name.
    """
    if other := next((key for key in _OTHER_MEDIA if record.get(key)), None):
        raise DataError(f"{where}: it has {other!r}, which is not supported: a sample has one image at most")
    paths: set[str] = set()
    for key in ("image", "images"):
        value = record.get(key)
        found = value if isinstance(value, list) else [] if value is None or value == "" else [value]
        if not all(isinstance(path, str) and path.strip() for path in found):
            raise DataError(f"{where}: {key!r} must be a path, or a list of one, got {value!r:.60}")
        if len(found) > 1:
            raise DataError(f"{where}: {key!r} names {len(found)} images; a sample has one at most")
        paths.update(found)
    if len(paths) > 1:
        raise DataError(f"{where}: 'image' and 'images' name different images; a sample has one at most")
    if not paths and (other := next((key for key in _OTHER_NAMES if record.get(key)), None)):
        raise DataError(f"{where}: it has no 'image' but {other!r}, which is not read; call it 'image'")
    return next(iter(paths), "")


def read_record(record: Mapping[str, Any], where: str, *, trim: bool = False) -> tuple[tuple[Message, ...], str]:
    """The messages of a conversation record and the path of its image, "" for a text.

    A top-level ``system`` is the system message.

    Args:
        record: See ``read_conversation`` and ``read_image``.
        where: "file:line", for messages.
        trim: See ``trim_turns``.
    Raises:
        DataError: As those; ``system`` is not text or there is a second system message; or a placeholder ``<image>`` is
            wrong: at most one is allowed, in a question, and only with an image.
    """
    messages, image = read_conversation(record, where, trim=trim), read_image(record, where)
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{where}: 'system' must be a text, got {system!r:.60}")
    if system and messages[0]["role"] == "system":
        raise DataError(f"{where}: there is a 'system' and a system message as well; expected one of them")
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    count = 0
    for index, message in enumerate(messages):
        found = message["content"].count(IMAGE_PLACEHOLDER)
        if found and message["role"] != "user":
            raise DataError(
                f"{where}: message {index} ({message['role']}) holds {IMAGE_PLACEHOLDER}; only questions may"
            )
        count += found
        if message["role"] == "user" and (mark := _OTHER_MARKS.search(message["content"])):
            raise DataError(
                f"{where}: message {index} holds {mark[0].strip()!r:.40}; an image is named by 'image' and marked "
                f"{IMAGE_PLACEHOLDER}, and nothing else can be shown"
            )
    if count > bool(image):
        named = "one image" if image else "no image"
        raise DataError(f"{where}: the questions hold {IMAGE_PLACEHOLDER} {count} times, but the record has {named}")
    return messages, image


def write_conversation(
    sample_id: str, messages: Sequence[Message], *, image: str = "", task: str = ""
) -> dict[str, Any]:
    """Make a record in LLaVA's format; ``<image>`` precedes the first question if there is an image.

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


def read_sample(
    record: Mapping[str, Any],
    sample_id: str,
    where: str,
    folder: Path,
    task: str = "",
    *,
    is_root: bool = False,
    trim: bool = False,
) -> Sample:
    """A record of a source as a sample.

    It is a conversation (``conversations`` or ``messages``), plain text (``text``), a ``question`` with its ``answer``,
    or a ``caption``, which the task words: one of its wordings, drawn by the sample's id.

    Args:
        record: The record; its ``image`` is a path or a ``StoredImage``.
        sample_id: Names the sample in reports.
        where: "file:line".
        folder: Base folder of the image path.
        task: Default task for records without one.
        is_root: Whether the path must stay below ``folder``, as the user named it.
        trim: See ``trim_turns``.
    Raises:
        DataError: As ``read_record``; the text is empty; the image is not below the root.
    """
    name = str(record.get("task") or task)
    stored = record.get("image")
    if isinstance(stored, StoredImage):
        record = {**record, "image": stored.name}
    has_turns = "conversations" in record or "messages" in record
    if "text" in record and not has_turns:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: 'text' must be a text that is not empty, got {text!r:.60}")
        messages: tuple[Message, ...] = ()
        image = read_image(record, where)
    else:
        text = ""
        turns = record if has_turns else _worded(record, name, sample_id, where)
        messages, image = read_record(turns, where, trim=trim)
    place = stored if isinstance(stored, StoredImage) else _place(image, where, folder, is_root)
    return Sample(sample_id, name, messages, text, place, where)


def _place(image: str, where: str, folder: Path, is_root: bool) -> Path | None:
    if not image:
        return None
    try:
        return image_below(folder, image) if is_root else folder / image
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _worded(record: Mapping[str, Any], task: str, sample_id: str, where: str) -> Mapping[str, Any]:
    """The record with a conversation made of its caption, or of its question and answer."""
    question, answer = record.get("question"), record.get("answer", record.get("caption"))
    if "caption" in record and "answer" not in record:
        wordings = tasks.create(task if task in CAPTION_TASKS else "caption").wordings
        question = wordings[derive_key("wording", sample_id) % len(wordings)]
    elif question is None:
        raise DataError(
            f"{where}: expected conversations, messages, text, caption, or question and answer; it has: "
            f"{', '.join(record) or 'nothing'}"
        )
    turns = [("user", question), ("assistant", answer)]
    if not all(isinstance(content, str) for _, content in turns):
        raise DataError(f"{where}: question, answer and caption must be texts, got {question!r:.40} and {answer!r:.40}")
    return {**record, "messages": [{"role": role, "content": content} for role, content in turns]}


def encode_sample(
    sample: Sample,
    template: ConversationTemplate,
    tokenizer: TextTokenizer,
    max_tokens: int | None = None,
    over_length: OverLength = "error",
) -> EncodedConversation:
    """Token ids and labels of a sample. In plain text, all tokens are labelled, end-of-sentence included.

    Args:
        sample: The sample.
        template: Conversation template.
        tokenizer: Tokenizer that returns character offsets.
        max_tokens: Maximum length (image tokens not counted); None: any length.
        over_length: Policy for longer samples: ``error`` (a bad sample), ``truncate`` (cut at the end; flagged in
            ``is_truncated``), ``skip`` (left out and counted separately), ``continue`` (plain text keeps its whole
            length and is split later, conversations are cut).
    Raises:
        OverLengthError: Too long, ``skip``.
        DataError: Too long, ``error``; or no labelled token is left. The message names the sample.
    """
    is_split = over_length == "continue" and not sample.messages and sample.image is None
    limit = max_tokens if over_length in ("truncate", "continue") and not is_split else None
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
    if max_tokens is not None and len(encoded.token_ids) > max_tokens and not is_split:
        kind = OverLengthError if over_length == "skip" else DataError
        raise kind(f"sample {sample.id}: {len(encoded.token_ids)} tokens, at most {max_tokens} are allowed")
    return encoded
