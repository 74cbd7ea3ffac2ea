"""The files that make a tokenizer, by name: found in a folder, read, and told apart.

Two kinds can be used: SentencePiece's ``tokenizer.model``, and ``tokenizer.json`` of the ``tokenizers`` library with
the small files beside it that say which token begins and ends a text. A third kind, tiktoken's, is only recognised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit.errors import CheckpointError

SENTENCEPIECE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
SIDE_NAMES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What may lie beside a ``tokenizer.json`` and belongs to it."""
FILE_NAMES = (SENTENCEPIECE_NAME, JSON_NAME, *SIDE_NAMES, "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")
"""All that may belong to one tokenizer."""
IMAGE_TOKEN = "<image>"  # noqa: S105 - no password
"""Stands for an image in texts of other libraries; a token that transformers adds, with no row in the embedding."""
TIKTOKEN = "is a tiktoken model, which cannot be used; put the tokenizer.json of the same model beside it"

TokenizerSource = str | Path | bytes | Mapping[str, bytes]
"""A folder, a file, the content of a ``tokenizer.model``, or name -> content."""

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_PLAIN_SPECIAL = frozenset(("<unk>", "<s>", "</s>", "<pad>"))


def is_tiktoken(content: bytes) -> bool:
    """Whether a ``tokenizer.model`` is tiktoken's: lines of a token in base64 and its rank."""
    return _TIKTOKEN_LINE.match(content) is not None


def read_tokenizer_files(source: TokenizerSource) -> dict[str, bytes]:
    """Name -> content of a tokenizer's files; the first is the one that holds the tokens.

    Args:
        source: Where they are; a ``tokenizer.json`` brings the files of ``SIDE_NAMES`` beside it along, and leaves a
            token for images behind.
    Raises:
        CheckpointError: There is no tokenizer, or a file cannot be read.
    """
    if isinstance(source, bytes):
        return {JSON_NAME if source.lstrip()[:1] == b"{" else SENTENCEPIECE_NAME: source}
    if isinstance(source, Mapping):
        names = [name for name in (SENTENCEPIECE_NAME, JSON_NAME) if name in source]
        if len(names) != 1:
            raise CheckpointError(
                f"tokenizer: expected one of {SENTENCEPIECE_NAME} and {JSON_NAME}, got {', '.join(source) or 'nothing'}"
            )
        return {names[0]: source[names[0]], **source}
    path = Path(source)
    if path.is_dir():
        found = choose_tokenizer(path)
        if found is None:
            raise CheckpointError(f"{path}: holds neither {SENTENCEPIECE_NAME} nor {JSON_NAME}")
        path = found
    if path.suffix != ".json":
        return {SENTENCEPIECE_NAME: _read(path)}
    beside = [path.with_name(name) for name in SIDE_NAMES if path.with_name(name).is_file()]
    return _without_image_token({JSON_NAME: _read(path), **{side.name: _read(side) for side in beside}})


def _without_image_token(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files without the image's token, which transformers writes into ``tokenizer.json`` behind all others."""
    config = files.get("tokenizer_config.json")
    if config is None or parse_json(config, "tokenizer_config.json").get("image_token") != IMAGE_TOKEN:
        return files
    document = parse_json(files[JSON_NAME], JSON_NAME)
    added = document.get("added_tokens")
    if not isinstance(added, list) or not added or added[-1].get("content") != IMAGE_TOKEN:
        return files
    document["added_tokens"] = added[:-1]
    return files | {JSON_NAME: json.dumps(document, ensure_ascii=False).encode()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"tokenizer model {path}: cannot be read: {error.strerror}") from error


def choose_tokenizer(folder: Path) -> Path | None:
    """The file of a folder that holds its tokens; None if there is none that can be used.

    Where both kinds lie there, SentencePiece's is taken, unless it is tiktoken's or ``tokenizer.json`` has special
    tokens that it does not: those of a chat, or added ones.

    Raises:
        CheckpointError: A file cannot be read.
    """
    model, fast = folder / SENTENCEPIECE_NAME, folder / JSON_NAME
    has_model = model.is_file() and not is_tiktoken(_read(model))
    if not fast.is_file():
        return model if has_model else None
    return fast if not has_model or _added(parse_json(_read(fast), fast)) - _PLAIN_SPECIAL else model


def parse_json(content: bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: It is none.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: holds a {type(found).__name__}, expected an object")
    return found


def _added(document: Mapping[str, Any]) -> set[str]:
    tokens = document.get("added_tokens")
    return (
        {str(each.get("content")) for each in tokens if isinstance(each, dict)} if isinstance(tokens, list) else set()
    )


def tokens_by_id(files: Mapping[str, bytes], where: str | Path = "the tokenizer") -> dict[int, str]:
    """The token of each id, added ones included.

    Args:
        files: From ``read_tokenizer_files``.
        where: For messages.
    Raises:
        CheckpointError: The files are no tokenizer that can be used.
    """
    name, content = next(iter(files.items()))
    if name == JSON_NAME:
        document = parse_json(content, where)
        vocab = (document.get("model") or {}).get("vocab")
        if not isinstance(vocab, dict | list):
            raise CheckpointError(f"{where}: has no vocabulary")
        pairs = {index: text for text, index in vocab.items()} if isinstance(vocab, dict) else dict(enumerate(vocab))
        found = {index: each[0] if isinstance(each, list) else each for index, each in pairs.items()}
        added = [each for each in document.get("added_tokens") or () if isinstance(each, dict)]
        return found | {each["id"]: each["content"] for each in added}
    size = tokenizer_size(files, where)
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=content)
    return {index: model.id_to_piece(index) for index in range(size)}


def added_beside(folder: Path, size: int) -> list[str]:
    """Tokens that the files beside a ``tokenizer.model`` add to its pieces.

    Args:
        folder: Where ``added_tokens.json`` and ``tokenizer_config.json`` may lie.
        size: Number of pieces.
    Raises:
        CheckpointError: A file is damaged.
    """
    found: dict[Any, Any] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        content = parse_json(_read(folder / name), folder / name) if (folder / name).is_file() else {}
        if name == "added_tokens.json":
            found |= {index: text for text, index in content.items()}
        elif isinstance(decoder := content.get("added_tokens_decoder"), dict):
            found |= {
                int(index): each.get("content")
                for index, each in decoder.items()
                if index.isdecimal() and len(index) < 10
            }
    return [str(found[index]) for index in sorted(index for index in found if type(index) is int and index >= size)]


def tokenizer_size(files: Mapping[str, bytes], where: str | Path = "the tokenizer") -> int:
    """Number of ids of a tokenizer.

    Args:
        files: From ``read_tokenizer_files``.
        where: For messages.
    Raises:
        CheckpointError: The files are no tokenizer that can be used.
    """
    name, content = next(iter(files.items()))
    if name == JSON_NAME:
        return max(tokens_by_id(files, where), default=-1) + 1
    if is_tiktoken(content):
        raise CheckpointError(f"{where}: {TIKTOKEN}")
    from sentencepiece import SentencePieceProcessor

    try:
        if not content:
            raise ValueError("it is empty")
        return int(SentencePieceProcessor(model_proto=content).get_piece_size())
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a SentencePiece model: {error}") from error
