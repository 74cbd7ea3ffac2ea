"""SentencePiece models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sphinxkit.errors import CheckpointError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class SentencePieceModel:
    """A ``tokenizer.model``, as Llama 1 and 2 and SPHINX ship it; see ``base.TokenModel``.

    SentencePiece itself puts a space in front of the text ("dummy prefix") where the model asks for it; nothing is
    stripped or added here. Padding is by the model's own id, else by the unknown one (0 for Llama; the public SPHINX
    code pads with 0).

    Args:
        content: Of the file.
        where: For messages.
    Raises:
        CheckpointError: It is not a SentencePiece model.
    Source: Kudo and Richardson, "SentencePiece", arXiv:1808.06226.
    """

    def __init__(self, content: bytes, where: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            if not content:
                raise RuntimeError("it is empty")
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise CheckpointError(f"{where}: is not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        own_pad: int = self._processor.pad_id()
        self.pad_id: int = own_pad if own_pad >= 0 else self.unk_id
        pieces: list[str] = [self._processor.id_to_piece(token) for token in range(self.vocab_size)]
        self._bytes = {
            token: bytes([int(match.group(1), 16)])
            for token, piece in enumerate(pieces)
            if self._processor.is_byte(token) and (match := _BYTE_PIECE.fullmatch(piece))
        }
        self.control_ids = frozenset(token for token in range(self.vocab_size) if self._processor.is_control(token))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and the characters that each covers; the space that SentencePiece adds covers nothing."""
        mapping = self._processor.Encode(text, return_type="offset_mapping", return_bytes=False)
        ids: list[int] = mapping["ids"]
        spans: list[tuple[int, int]] = list(mapping["offsets"])
        # SentencePiece gives a character's span to the last of its byte tokens and an empty one to those before it.
        end = len(text)
        for index in range(len(ids) - 1, -1, -1):
            start, stop = spans[index]
            if ids[index] in self._bytes and start == stop:
                spans[index] = (start, end)
            else:
                end = stop
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD one by one."""
        text: str = self._processor.Decode(list(ids))
        return text

    def bytes_of(self, token: int) -> bytes | None:
        """The byte of a byte piece."""
        return self._bytes.get(token)
