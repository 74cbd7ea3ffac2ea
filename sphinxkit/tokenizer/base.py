"""What a kind of tokenizer has to do; ``Tokenizer`` does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenModel(Protocol):
    """A vocabulary and how text is cut into its pieces.

    Attributes:
        vocab_size: Number of ids, special ones included.
        bos_id: Id that begins a text; -1 if texts begin without one.
        eos_id: Id that ends a text, -1 if there is none.
        unk_id: Id of the unknown piece, -1 if there is none.
        pad_id: Id to pad with.
        control_ids: Ids that stand for no text.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    control_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing in front or behind."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and the characters, start and end, that each covers."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control ids left out."""
        ...

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a piece stands for, where a character can be spread over several pieces; else None."""
        ...
