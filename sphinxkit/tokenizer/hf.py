"""``tokenizer.json`` through the ``tokenizers`` library, with the ids that its configuration names."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.tokenizer_files import JSON_NAME, parse_json

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceModel:
    """A ``tokenizer.json``; see ``base.TokenModel``.

    Special tokens that a text spells out are those tokens, as in transformers. A text begins with ``bos_token`` where
    the file's own post-processor or ``add_bos_token`` says so; else ``bos_id`` is -1.

    Args:
        files: ``tokenizer.json``, and ``tokenizer_config.json`` or ``special_tokens_map.json`` if there are such.
        where: For messages.
    Raises:
        CheckpointError: A file is damaged, or names a token that is not in the vocabulary.
    Source: Hugging Face, tokenizers; transformers, tokenization_utils_tokenizers.py.
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        from tokenizers import Tokenizer

        document = parse_json(files[JSON_NAME], where)
        try:
            self._tokenizer = Tokenizer.from_buffer(files[JSON_NAME])
        except Exception as error:  # the library raises bare exceptions
            raise CheckpointError(f"{where}: is not a tokenizer of the tokenizers library ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if name in files:
                config |= parse_json(files[name], name)
        self._where = where
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        begins = self._tokenizer.encode("", add_special_tokens=True).ids
        # spans are of all characters, white space at a token's edge included
        self._tokenizer.post_processor = None
        bos = self._id_of(config.get("bos_token"))
        if config.get("add_bos_token", False) is True or (begins and begins[0] == bos):
            self.bos_id = bos
        else:
            self.bos_id = -1
        self.eos_id = self._id_of(config.get("eos_token"))
        model = document.get("model") or {}
        unk = config.get("unk_token") or model.get("unk_token")
        self.unk_id = self._id_of(unk) if model.get("type") != "BPE" or model.get("unk_token") else -1
        found = (self._id_of(config.get("pad_token")), self.unk_id, self.eos_id, 0)
        self.pad_id = next(token for token in found if token >= 0)
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_ids = frozenset(token for token, each in added.items() if each.special)
        is_byte_level = '"ByteLevel"' in str(document.get("decoder")).replace("'", '"')
        self._bytes: dict[int, bytes] = {}
        for piece, token in vocab.items():
            if token in added:
                continue
            if is_byte_level:
                self._bytes[token] = bytes(_byte_of_character()[character] for character in piece)
            elif model.get("byte_fallback") and (match := _BYTE_PIECE.fullmatch(piece)):
                self._bytes[token] = bytes([int(match.group(1), 16)])

    def _id_of(self, token: Any) -> int:
        """Id of a token as a configuration has it: text, or an object with its content."""
        content = token.get("content") if isinstance(token, Mapping) else token
        if content is None:
            return -1
        found = self._tokenizer.token_to_id(str(content))
        if found is None:
            raise CheckpointError(f"{self._where}: the vocabulary has no {content!r}, which its configuration names")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and the characters that each covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans, following = list(encoding.offsets), len(text)
        for index in range(len(spans) - 1, -1, -1):  # characters that the normaliser joined or dropped
            start, end = spans[index]
            spans[index] = (start, max(end, following))
            following = min(following, start)
        return list(encoding.ids), spans

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a byte-level piece, or the byte of a byte piece."""
        return self._bytes.get(token)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies.

    Source: GPT-2, encoder.py, bytes_to_unicode: printable bytes stand for themselves, the others for U+0100 onwards.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
