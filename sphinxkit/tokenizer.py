"""SentencePiece, with character spans of every token and decoding that can be streamed."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import CheckpointError, DataError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A SentencePiece model, as Llama and SPHINX ship it.

    SentencePiece itself puts a space in front of the text ("dummy prefix") where the model asks for it; nothing is
    stripped or added here. Objects can be pickled and then carry the model with them.

    Args:
        model: Path of a ``tokenizer.model``, or the content of one.
    Raises:
        CheckpointError: There is no such file, or it is not a SentencePiece model.
    Source: Kudo and Richardson, "SentencePiece", arXiv:1808.06226.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        if isinstance(model, bytes):
            self._model, where = model, f"tokenizer model of {len(model)} bytes"
        else:
            where = f"tokenizer model {model}"
            try:
                self._model = Path(model).read_bytes()
            except OSError as error:
                raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
        self._processor = SentencePieceProcessor()
        try:
            if not self._model:
                raise RuntimeError("it is empty")
            self._processor.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise CheckpointError(f"{where}: is not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.vocab_size()
        """Number of pieces, special ones included."""
        self.bos_id: int = self._processor.bos_id()
        """Id of "beginning of sentence", -1 if the model has none."""
        self.eos_id: int = self._processor.eos_id()
        """Id of "end of sentence", -1 if the model has none."""
        self.unk_id: int = self._processor.unk_id()
        """Id of the unknown piece; every SentencePiece model has one."""
        own_pad: int = self._processor.pad_id()
        self.pad_id: int = own_pad if own_pad >= 0 else self.unk_id
        """Id to pad with: the model's own, else ``unk_id`` (0 for Llama; the public SPHINX code pads with 0)."""
        pieces: list[str] = [self._processor.id_to_piece(token) for token in range(self.vocab_size)]
        self._byte_of = {
            token: int(match.group(1), 16)
            for token, piece in enumerate(pieces)
            if self._processor.is_byte(token) and (match := _BYTE_PIECE.fullmatch(piece))
        }
        self._control = frozenset(token for token in range(self.vocab_size) if self._processor.is_control(token))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self._model,)

    def _with_ends(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        for wanted, token, name in ((bos, self.bos_id, "beginning"), (eos, self.eos_id, "end")):
            if wanted and token < 0:
                raise DataError(f"tokenizer: the model has no token for the {name} of a sentence")
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

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
            bos: Put the beginning-of-sentence token first.
            eos: Put the end-of-sentence token last.
        Raises:
            DataError: The text is not valid Unicode, or the model lacks the token asked for.
        """
        self._check_text(text)
        ids: list[int] = self._processor.EncodeAsIds(text)
        return self._with_ends(ids, bos, eos)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of ``text`` and the span of characters, start and end, that each stands for.

        The ids are those of ``encode(text)``. ``text[start:end]`` is what a token covers, spaces included; the space
        that SentencePiece adds in front covers nothing. A character that falls into several byte tokens is the span of
        each of them.

        Raises:
            DataError: The text is not valid Unicode.
        """
        self._check_text(text)
        mapping = self._processor.Encode(text, return_type="offset_mapping", return_bytes=False)
        ids: list[int] = mapping["ids"]
        spans: list[tuple[int, int]] = list(mapping["offsets"])
        # SentencePiece gives a character's span to the last of its byte tokens and an empty one to those before it.
        end = len(text)
        for index in range(len(ids) - 1, -1, -1):
            start, stop = spans[index]
            if ids[index] in self._byte_of and start == stop:
                spans[index] = (start, end)
            else:
                end = stop
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text; control tokens vanish, bytes that are no UTF-8 become U+FFFD one by one.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        ids = list(ids)
        self._check_ids(ids)
        text: str = self._processor.Decode(ids)
        return text

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
        """A token with visible text, and its text: SentencePiece drops spaces in front of the first text only."""
        for token in range(self.vocab_size):
            if token not in self._control and token != self.unk_id and self._byte_of.get(token, 0) < 0x80:
                text = self.decode([token])
                if text and not text[:1].isspace() and text.isprintable():
                    return token, text
        raise DataError("tokenizer: no piece of the model stands for visible text")

    def _check_ids(self, ids: Sequence[int]) -> None:
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise DataError(f"tokenizer: id {wrong[0]} is outside the vocabulary of {self.vocab_size}")

    def stream(self) -> IncrementalDecoder:
        """A fresh decoder that turns ids into text as they come."""
        return IncrementalDecoder(self)

    def incomplete_bytes(self, ids: Sequence[int]) -> int:
        """How many tokens at the end of ``ids`` are the start of a UTF-8 character that is not finished yet: 0 to 3."""
        for count in range(1, min(3, len(ids)) + 1):
            byte = self._byte_of.get(ids[-count])
            if byte is None:
                return 0
            if byte >= 0xC0:  # a leading byte announces how many bytes its character has
                needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 0
                return count if count < needed else 0
            if byte < 0x80:
                return 0
        return 0

    def to_bytes(self) -> bytes:
        """The model file's content, byte for byte."""
        return self._model

    def save(self, path: str | Path) -> None:
        """Write the model file, byte for byte as it was read."""
        with atomic_file(path) as temporary:
            temporary.write_bytes(self._model)


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
