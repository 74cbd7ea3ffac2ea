from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = [
    "",
    " ",
    "a",
    " two  spaces ",
    "\n###",
    "Café 你好!\n### x",
    "\U0001f600 smile",
    "e\u0301 ﬁ",
    "<s> text </s>",
    "\0",
    "▁",
]


def train(**options: object) -> Tokenizer:
    """A small tokenizer of another kind than the golden one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat: a b c", "### Human: what? ### Assistant: a cat."] * 20),
        model_writer=model,
        minloglevel=3,
        hard_vocab_limit=options.get("model_type", "unigram") != "unigram",
        **options,
    )
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "llama_ens5" / "tokenizer.model")


@pytest.fixture(scope="module")
def others() -> list[Tokenizer]:
    return [
        train(vocab_size=60, model_type="unigram", character_coverage=1.0),  # no byte pieces, NFKC
        train(vocab_size=330, model_type="bpe", byte_fallback=True, treat_whitespace_as_suffix=True),
        train(vocab_size=310, model_type="bpe", byte_fallback=True, add_dummy_prefix=False, split_by_whitespace=False),
    ]


def test_ids_of_special_tokens_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (512, 1, 2, 0)
    assert tokenizer.pad_id == 0
    assert train(vocab_size=60, pad_id=3).pad_id == 3


def test_encoding_equals_the_public_implementation(tokenizer: Tokenizer) -> None:
    golden = json.loads((GOLDEN / "llama_ens5" / "golden.json").read_text())
    for conversation in golden["conversations"]:
        assert tokenizer.encode(conversation["prompt"], bos=True) == conversation["token_ids"]
        assert tokenizer.encode(conversation["prompt"], bos=True, eos=True) == conversation["token_ids_bos_eos"]


@pytest.mark.parametrize("name", ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light"])
def test_decoding_equals_the_public_implementation(name: str) -> None:
    tokenizer = Tokenizer(GOLDEN / name / "tokenizer.model")
    golden = json.loads((GOLDEN / name / "golden.json").read_text())
    runs = [run for case in golden["generate"] for run in case["generate"].values()]
    assert runs
    for run in runs:
        assert [tokenizer.decode(ids) for ids in run["token_ids"]] == run["text"]


def test_offsets_by_hand(tokenizer: Tokenizer) -> None:
    # pieces: "▁" added, "▁" "C" "a" "f" and two bytes of "é", "▁" and three bytes of "你", "!"
    ids, spans = tokenizer.encode_with_offsets(" Café 你!")
    assert ids == tokenizer.encode(" Café 你!")
    assert spans == [
        (0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (4, 5), (5, 6), (6, 7), (6, 7), (6, 7), (7, 8),
    ]  # fmt: skip
    # "▁The" takes the added space, "▁assistant" the real one
    assert tokenizer.encode_with_offsets("The assistant")[1] == [(0, 3), (3, 13)]
    assert tokenizer.encode_with_offsets("") == ([], [])


def check_offsets(tokenizer: Tokenizer, text: str, dropped: str = "") -> None:
    """Spans run through the text from start to end; only characters of ``dropped`` may be left out."""
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(spans)
    position = 0
    for start, end in spans:
        assert start <= end <= len(text)
        assert not text[position:start].strip(dropped or None)
        assert dropped or start <= position
        position = max(position, end)
    assert not text[position:].strip(dropped or None)
    assert dropped or position == len(text)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text(tokenizer: Tokenizer, text: str) -> None:
    check_offsets(tokenizer, text)
    ids, spans = tokenizer.encode_with_offsets(text)
    for token, (start, end) in zip(ids, spans, strict=True):  # the model is the identity on text: spans are exact
        if (
            end > start
            and not tokenizer.incomplete_bytes([token])
            and not 0x80 <= (tokenizer._model.bytes_of(token) or b"\0")[0] < 0xC0
        ):
            assert tokenizer.decode([token]).strip(" ") == text[start:end].strip(" ").replace("▁", "")


@given(text=st.text(max_size=40))
def test_offsets_cover_any_text(text: str, tokenizer: Tokenizer) -> None:
    check_offsets(tokenizer, text)


@given(ids=st.lists(st.integers(0, 511), max_size=60), chunk=st.integers(1, 4))
def test_streamed_text_is_a_prefix_of_the_whole(ids: list[int], chunk: int, tokenizer: Tokenizer) -> None:
    whole = tokenizer.decode(ids)
    decoder = tokenizer.stream()
    for start in range(0, len(ids), chunk):
        piece = decoder.feed(ids[start : start + chunk])
        assert decoder.text.endswith(piece)
        assert whole.startswith(decoder.text)
    decoder.finish()
    assert decoder.text == whole


@given(text=st.text(max_size=30))
def test_stream_never_shows_half_a_character(text: str, tokenizer: Tokenizer) -> None:
    text = text.replace("▁", "")  # SentencePiece's own mark for a space
    decoder = tokenizer.stream()
    pieces = [decoder.feed(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert decoder.finish() == ""
    assert "\ufffd" not in pieces or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 3 + 255), max_size=40))  # special tokens and bytes only
def test_streamed_bytes_are_a_prefix_of_the_whole(ids: list[int], tokenizer: Tokenizer) -> None:
    whole = tokenizer.decode(ids)
    decoder = tokenizer.stream()
    for token in ids:
        decoder.feed(token)
        assert whole.startswith(decoder.text)
    decoder.finish()
    assert decoder.text == whole


def test_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你")  # "▁" and three bytes
    decoder = tokenizer.stream()
    assert [decoder.feed(token) for token in ids] == ["", "", "", "你"]
    broken = tokenizer.stream()
    assert broken.feed(ids[:3]) == ""
    assert broken.feed(tokenizer.encode("The")) == "\ufffd\ufffd The"


def test_other_kinds_of_tokenizer(others: list[Tokenizer]) -> None:
    for tokenizer in others:
        for text in [*TEXTS, "the cat", "what? the mat"]:
            check_offsets(tokenizer, text, dropped=" \n\0▁")  # their normaliser drops white space
            ids = tokenizer.encode(text)
            decoder = tokenizer.stream()
            for token in ids:
                decoder.feed(token)
            decoder.finish()
            assert decoder.text == tokenizer.decode(ids)


def test_decode_leaves_control_tokens_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("The table", bos=True, eos=True)) == "The table"
    assert tokenizer.decode([]) == ""


def test_save_is_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy.model")
    original = (GOLDEN / "llama_ens5" / "tokenizer.model").read_bytes()
    assert (tmp_path / "copy.model").read_bytes() == original
    assert tokenizer.files == {"tokenizer.model": original}
    copy = pickle.loads(pickle.dumps(Tokenizer(original)))
    assert copy.encode("The table") == tokenizer.encode("The table")


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer model .*none\.model: cannot be read: No such file"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(CheckpointError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "text.model").write_text("hello, I am no model")
    with pytest.raises(CheckpointError, match=r"text\.model: is not a SentencePiece model"):
        Tokenizer(str(tmp_path / "text.model"))
    with pytest.raises(CheckpointError, match=r"model of 0 bytes: is not a SentencePiece model \(it is empty"):
        Tokenizer(b"")
    whole = (GOLDEN / "llama_ens5" / "tokenizer.model").read_bytes()
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        Tokenizer(whole[: len(whole) // 2 + 1])


def test_bad_text_and_ids(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="half a surrogate pair at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="half a surrogate pair at character 0"):
        tokenizer.encode_with_offsets("\udc00")
    with pytest.raises(DataError, match="id 512 is outside the vocabulary of 512"):
        tokenizer.decode([5, 512])
    with pytest.raises(DataError, match="id -100 is outside the vocabulary"):
        tokenizer.decode([-100])
    decoder = tokenizer.stream()
    with pytest.raises(DataError, match="id 600 is outside"):
        decoder.feed([5, 600])
    assert decoder.finish() == ""
    with pytest.raises(DataError, match="has been finished"):
        decoder.feed(5)
    bare = train(vocab_size=60, bos_id=-1, eos_id=-1)
    assert bare.encode("a", bos=True) == bare.encode("a")
    with pytest.raises(DataError, match="no token for the end of a sentence"):
        bare.encode("a", eos=True)


def test_streaming_keeps_spaces_behind_a_lone_space_piece() -> None:
    """With the defaults of SentencePiece's trainer, which drops all spaces at the beginning of a text."""
    words = ["red", "green", "blue", "small", "large", "circle", "square", "no", "yes", "page", "two", "three"]
    lines = [" ".join(words[(i * k) % 12] for k in range(1, 7)) + "." for i in range(200)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer(buffer.getvalue())
    space, red, no, bracket = (
        tokenizer._model._processor.piece_to_id(piece) for piece in ("▁", "▁red", "▁no", "<0x5D>")
    )
    for ids, text in (
        ([bracket, space, no], "]  no"),
        ([red, space, space, no], "red   no"),
        ([space, space, red, space, bracket, space, no], "red ]  no"),
        ([space, space], ""),
        ([red, space, space], "red  "),
    ):
        assert tokenizer.decode(ids) == text
        decoder = tokenizer.stream()
        pieces = [decoder.feed(token) for token in ids] + [decoder.finish()]
        assert "".join(pieces) == decoder.text == text
