from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from sphinxkit import nano
from sphinxkit.checkpoint.formats.tokenizer_json import from_sentencepiece, special_ids
from sphinxkit.errors import CheckpointError

CONTENT = (Path(__file__).parents[2] / "golden/llama_ens5/tokenizer.model").read_bytes()
OURS = SentencePieceProcessor(model_proto=CONTENT)
THEIRS = Tokenizer.from_str(from_sentencepiece(CONTENT)["tokenizer.json"])
PIECES = [OURS.id_to_piece(token).replace("\u2581", " ") for token in range(3, OURS.get_piece_size())]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=8).map("".join))
def test_ids_and_text_are_those_of_sentencepiece(text: str) -> None:
    if any(name in text for name in ("<s>", "</s>", "<unk>")):
        return  # special tokens there, text here
    ids = OURS.encode(text)
    assert THEIRS.encode(text).ids == [1, *ids]
    assert THEIRS.decode(ids) == OURS.decode(ids)


NANO = (Path(nano.path()) / "tokenizer.model").read_bytes()  # 400 pieces that are never cut
NANO_OURS = SentencePieceProcessor(model_proto=NANO)
NANO_THEIRS = Tokenizer.from_str(from_sentencepiece(NANO)["tokenizer.json"])
NANO_PIECES = [NANO_OURS.id_to_piece(token).replace("\u2581", " ") for token in range(3, NANO_OURS.get_piece_size())]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(NANO_PIECES), st.text(max_size=4)), max_size=8).map("".join))
def test_pieces_that_are_never_cut(text: str) -> None:
    if any(name in text for name in ("<s>", "</s>", "<unk>")):
        return
    ids = NANO_OURS.encode(text)
    assert NANO_THEIRS.encode(text).ids == [1, *ids]
    if 0 not in ids:  # an unknown piece is written by SentencePiece alone
        assert NANO_THEIRS.decode(ids) == NANO_OURS.decode(ids)


def test_special_tokens() -> None:
    assert special_ids({"tokenizer.model": CONTENT}) == {"bos_token_id": 1, "eos_token_id": 2}
    files = {name: text.encode() for name, text in from_sentencepiece(CONTENT).items()}
    assert special_ids(files) == {"bos_token_id": 1, "eos_token_id": 2}
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert special_ids({}) == {}


def test_models_that_cannot_be_followed() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not a SentencePiece model"):
        from_sentencepiece(b"words")
    # proto2 takes the last of a field that comes twice: trainer_spec.model_type 1, of unigrams
    with pytest.raises(CheckpointError, match=r"tokenizer.model: has no exact tokenizer.json: it is no BPE model"):
        from_sentencepiece(CONTENT + bytes([0x12, 2, 0x18, 1]))
