"""``tokenizer.json``: ids as transformers gives them, spans, streaming and the files."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.tensor_files.tokenizer_files import choose_tokenizer, read_tokenizer_files, tokenizer_size
from sphinxkit.tokenizer import Tokenizer
from tests.tokenizer.conftest import SAMPLES, make_lines

FAMILIES = ["qwen", "llama3", "llama2"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str, folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer(folders[family])


def their_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ends = {key: value for key, value in config.items() if isinstance(value, str)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False, **ends
    )


def check_ids(tokenizer: Tokenizer, theirs: Any, lines: list[str]) -> None:
    for line in lines:
        ids = tokenizer.encode(line)
        assert ids == theirs.encode(line, add_special_tokens=False), line
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), line
    assert tokenizer.encode("a b", bos=True) == theirs.encode("a b")


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_ids_are_those_of_transformers(family: str, tokenizer: Tokenizer, folders: dict[str, Path]) -> None:
    chat = ["<|im_start|>user\nHi<|im_end|>\n", "<|eot_id|>a <s> b</s>", "<think>", ""]
    check_ids(tokenizer, their_tokenizer(folders[family]), [*SAMPLES, *chat, *make_lines(100)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ids_of_ten_thousand_lines(family: str, tokenizer: Tokenizer, folders: dict[str, Path]) -> None:
    check_ids(tokenizer, their_tokenizer(folders[family]), make_lines(10_000, seed=1))


def test_ends(folders: dict[str, Path]) -> None:
    qwen, llama3, llama2 = (Tokenizer(folders[name]) for name in FAMILIES)
    assert qwen.bos_id == -1
    assert qwen.encode("a", bos=True, eos=True) == [*qwen.encode("a"), qwen.eos_id]
    assert qwen.decode([qwen.eos_id, qwen.pad_id, *qwen.encode("<think>a")]) == "<think>a"
    assert qwen.unk_id == -1
    assert llama3.encode("a", bos=True)[0] == llama3.bos_id == llama3.encode("<|begin_of_text|>")[0]
    assert (llama2.bos_id, llama2.eos_id, llama2.unk_id, llama2.pad_id) == (1, 2, 0, 0)
    assert llama3.pad_id == llama3.eos_id


def test_spans_cover_the_text_and_hold_the_tokens(tokenizer: Tokenizer) -> None:
    for text in [*SAMPLES, *make_lines(60, seed=2)]:
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        reached = 0
        for token, (start, end) in zip(ids, spans, strict=True):
            assert start <= reached, (text, spans)  # no character is left out
            assert reached <= max(end, reached)
            reached = max(reached, end)
            piece = tokenizer._model.bytes_of(token)
            if piece is not None and text.isascii():
                assert text[start:end].encode() == piece
        assert reached == len(text)


def test_a_character_of_several_tokens_is_the_span_of_each(tokenizer: Tokenizer) -> None:
    _, spans = tokenizer.encode_with_offsets("a\U0001f9ff!")
    held = [span for span in spans if span == (1, 2)]
    assert len(held) in (3, 4)  # bytes, of which byte-level may have joined two
    assert spans[-1] == (2, 3)


def test_streaming_gives_the_whole_text(tokenizer: Tokenizer) -> None:
    for text in [*SAMPLES, *make_lines(60, seed=3)]:
        ids = tokenizer.encode(text)
        for step in (1, 2, 3):
            decoder = tokenizer.stream()
            pieces = [decoder.feed(ids[index : index + step]) for index in range(0, len(ids), step)]
            assert not any("\ufffd" in piece for piece in pieces)
            assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids)


def test_half_characters_become_a_sign(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["llama3"])
    ids = tokenizer.encode("\U0001f9ff")
    assert tokenizer.incomplete_bytes(ids[:-1]) == len(ids) - 1
    decoder = tokenizer.stream()
    assert decoder.feed(ids[:-1]) == ""
    assert decoder.finish() == tokenizer.decode(ids[:-1]) == "\ufffd"


def test_files_are_kept_byte_for_byte(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[family]
    tokenizer = Tokenizer(folder / "tokenizer.json")
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer.files == {name: (folder / name).read_bytes() for name in names}
    tokenizer.save(tmp_path / "tokenizer.json")
    again = pickle.loads(pickle.dumps(Tokenizer(tmp_path)))
    assert again.encode("a b") == tokenizer.encode("a b")
    assert again.eos_id == tokenizer.eos_id
    assert tokenizer_size(tokenizer.files) == tokenizer.vocab_size
    assert Tokenizer(tokenizer.files["tokenizer.json"]).eos_id == -1  # its configuration was left behind


def test_what_is_no_tokenizer(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is not JSON"):
        Tokenizer(b"{")
    with pytest.raises(CheckpointError, match="is not a tokenizer of the tokenizers library"):
        Tokenizer(b"{}")
    with pytest.raises(CheckpointError, match=r"expected one of tokenizer.model and tokenizer.json, got a.txt"):
        Tokenizer({"a.txt": b""})
    files = read_tokenizer_files(folders["llama3"]) | {"tokenizer_config.json": b'{"eos_token": "<|none|>"}'}
    with pytest.raises(CheckpointError, match="the vocabulary has no '<|none|>', which its configuration names"):
        Tokenizer(files)
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        tokenizer_size({"tokenizer.json": b"{}"})
    bare = Tokenizer(read_tokenizer_files(folders["llama3"]) | {"tokenizer_config.json": b"{}"})
    with pytest.raises(DataError, match="no token for the end of a sentence"):
        bare.encode("a", eos=True)


def test_tiktoken_is_named_and_stops_nothing(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: is a tiktoken model, which cannot be used; put the"):
        Tokenizer(tmp_path / "tokenizer.model")
    with caplog.at_level(logging.WARNING):
        assert find_tokenizer(tmp_path, 3) is None
    assert "is a tiktoken model" in caplog.text
    shutil.copy(folders["llama3"] / "tokenizer.json", tmp_path)
    assert find_tokenizer(tmp_path, 1000) == tmp_path / "tokenizer.json"


def test_which_of_two_kinds_is_taken(folders: dict[str, Path], golden: Path, tmp_path: Path) -> None:
    """SentencePiece's, unless the other has tokens of a chat."""
    shutil.copy(golden / "llama_ens" / "tokenizer.model", tmp_path)
    shutil.copy(folders["llama2"] / "tokenizer.json", tmp_path)
    assert choose_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    shutil.copy(folders["qwen"] / "tokenizer.json", tmp_path)
    assert choose_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
