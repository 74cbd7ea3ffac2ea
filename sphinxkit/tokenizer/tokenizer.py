"""The tokenizer: ids with character spans, and decoding that can be streamed, whatever kind the files are of."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.tensor_files.tokenizer_files import (
    JSON_NAME,
    TIKTOKEN,
    TokenizerSource,
    is_tiktoken,
    read_tokenizer_files,
)
from sphinxkit.tokenizer.base import TokenModel
from sphinxkit.tokenizer.hf import HuggingFaceModel
from sphinxkit.tokenizer.sentencepiece import SentencePieceModel


class Tokenizer:
    """A SentencePiece model, or a ``tokenizer.json`` with the small files beside it.

    Objects can be pickled and then carry their files with them.

    Args:
        source: Path of a ``tokenizer.model`` or ``tokenizer.json`` or of a folder with one, the content of such a
            file, or name -> content of several.
    Raises:
        CheckpointError: There is no such file, or it is no tokenizer that can be used.
    """

    def __init__(self, source: TokenizerSource) -> None:
        self._files = read_tokenizer_files(source)
        name, content = next(iter(self._files.items()))
        where = f"tokenizer model {source}" if isinstance(source, str | Path) else f"{name} of {len(content)} bytes"
        if name != JSON_NAME and is_tiktoken(content):
            raise CheckpointError(f"{where}: {TIKTOKEN}")
        self._model: TokenModel = (
            HuggingFaceModel(self._files, where) if name == JSON_NAME else SentencePieceModel(content, where)
        )
        self.vocab_size: int = self._model.vocab_size
        """Number of pieces, special ones included."""
        self.bos_id: int = self._model.bos_id
        """Id of "beginning of sentence", -1 if texts begin without one."""
        self.eos_id: int = self._model.eos_id
        """Id of "end of sentence", -1 if there is none."""
        self.unk_id: int = self._model.unk_id
        """Id of the unknown piece, -1 if there is none."""
        self.pad_id: int = self._model.pad_id
        """Id to pad with."""

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[dict[str, bytes]]]:
        return Tokenizer, (self._files,)

    @property
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of its files, byte for byte as they were read."""
        return dict(self._files)

    def _with_ends(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        if eos and self.eos_id < 0:
            raise DataError("tokenizer: the model has no token for the end of a sentence")
        begin = [self.bos_id] if bos and self.bos_id >= 0 else []
        return begin + ids + [self.eos_id] * eos

    @staticmethod
    def _check_text(text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"tokenizer: text has half a surrogate pair at character {error.start}: {text[error.start]!r}"
            ) from error

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text to token ids.

        Args:
            text: Any text; the empty text gives no tokens of its own.
            bos: Put the beginning-of-sentence token first, if texts begin with one (Qwen's do not).
            eos: Put the end-of-sentence token last.
        Raises:
            DataError: The text is not valid Unicode, or there is no end-of-sentence token.
        """
        self._check_text(text)
        return self._with_ends(self._model.encode(text), bos, eos)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of ``text`` and the span of characters, start and end, that each stands for.

        The ids are those of ``encode(text)``. ``text[start:end]`` is what a token covers, spaces included; a space that
        is added in front covers nothing. A character that falls into several tokens is the span of each of them.

        Raises:
            DataError: The text is not valid Unicode.
        """
        self._check_text(text)
        return self._model.encode_with_offsets(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text; control tokens vanish, bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        ids = list(ids)
        self._check_ids(ids)
        return self._model.decode(ids)

    def decode_behind_text(self, ids: Sequence[int]) -> str:
        """Token ids to text, as they read behind other text: spaces at the beginning are kept.

        Args:
            ids: They begin at the start of a character.
        Raises:
            DataError: An id is outside the vocabulary, or the model has no piece that is plain text.
        """
        anchor, text = self._anchor
        return self.decode([anchor, *ids])[len(text) :]

    @functools.cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token with visible text, and its text: decoders drop spaces in front of the first text only."""
        for token in range(self.vocab_size):
            if token in self._model.control_ids or token == self.unk_id:
                continue
            if all(byte < 0x80 for byte in self._model.bytes_of(token) or b""):
                text = self.decode([token])
                if text and not text[:1].isspace() and text.isprintable():
                    return token, text
        raise DataError("tokenizer: no piece of the model stands for visible text")

    def _check_ids(self, ids: Sequence[int]) -> None:
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise DataError(f"tokenizer: id {wrong[0]} is outside the vocabulary of {self.vocab_size}")

    def control_id(self, text: str) -> int | None:
        """The control token that a text spells; None if it spells none, or more than one token."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and ids[0] in self._model.control_ids else None

    def stream(self) -> IncrementalDecoder:
        """A fresh decoder that turns ids into text as they come."""
        return IncrementalDecoder(self)

    def incomplete_bytes(self, ids: Sequence[int]) -> int:
        """How many tokens at the end of ``ids`` wait for the rest of a UTF-8 character; those before are whole."""
        tail = b""
        for count in range(1, len(ids) + 1):
            piece = self._model.bytes_of(ids[-count])
            if piece is None:
                return 0
            for index in range(len(piece) - 1, -1, -1):
                byte, behind = piece[index], len(piece) - index + len(tail)
                if byte >= 0xC0:  # a leading byte announces how many bytes its character has
                    needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 0
                    if behind >= needed:
                        return 0
                    if 0x80 <= piece[0] < 0xC0:  # the token ends a character, too, whose first bytes are before it
                        return count + self.incomplete_bytes(ids[:-count])
                    return count
                if byte < 0x80 or behind > 3:
                    return 0
            tail = piece + tail
        return 0

    def save(self, path: str | Path) -> None:
        """Write the files byte for byte as they were read.

        Args:
            path: Of the file that holds the tokens; the others come beside it.
        """
        names = list(self._files)
        for name, content in self._files.items():
            with atomic_file(path if name == names[0] else Path(path).with_name(name)) as temporary:
                temporary.write_bytes(content)


class IncrementalDecoder:
    """Turns token ids into text as they come, never ending in half a character.

    The pieces given out so far always join to a prefix of ``tokenizer.decode`` of all ids, and with ``finish`` they
    are all of it.

    Args:
        tokenizer: Whose ids they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # not given out; all of them until there is text, behind which spaces are kept
        self.text = ""
        """What has been given out so far."""
        self._is_finished = False

    def feed(self, ids: int | Sequence[int]) -> str:
        """Take one or more further ids; return the text that they make certain, "" if a character is unfinished.

        Raises:
            DataError: An id is outside the vocabulary (the decoder is left as it was), or ``finish`` came before.
        """
        if self._is_finished:
            raise DataError("incremental decoder: it has been finished; take a new one")
        fresh = [ids] if isinstance(ids, int) else list(ids)
        self._tokenizer._check_ids(fresh)
        self._ids.extend(fresh)
        return self._give(len(self._ids) - self._tokenizer.incomplete_bytes(self._ids))

    def finish(self) -> str:
        """The rest, bytes that never became a character as U+FFFD; nothing can be fed afterwards."""
        self._is_finished = True
        return self._give(len(self._ids))

    def _give(self, end: int) -> str:
        ids = self._ids[:end]
        if not ids:
            return ""
        piece = self._tokenizer.decode_behind_text(ids) if self.text else self._tokenizer.decode(ids)
        if piece or self.text:
            self._ids = self._ids[end:]
        self.text += piece
        return piece
