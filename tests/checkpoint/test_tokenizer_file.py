from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sphinxkit import checkpoint
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.tokenizer_files import read_tokenizer_files, tokenizer_size


def test_size_is_compared_with_the_embedding(golden: Path, tmp_path: Path) -> None:
    folder = golden / "llama_ens"
    assert tokenizer_size(read_tokenizer_files(folder / "tokenizer.model")) == 512
    assert find_tokenizer(folder, 512) == folder / "tokenizer.model"
    assert find_tokenizer(folder, None) == folder / "tokenizer.model"
    assert find_tokenizer(folder, 520, allow_more_rows=True) == folder / "tokenizer.model"
    assert find_tokenizer(tmp_path, 512) is None
    for rows, more in ((511, True), (511, False), (513, False)):
        with pytest.raises(
            CheckpointError, match=rf"has 512 pieces but the embedding has {rows} rows.*put the right one"
        ):
            find_tokenizer(folder, rows, allow_more_rows=more)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<|im_start|>": 512, "<|im_end|>": 513, "<s>": 1}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"513": {"content": "<|im_end|>"}, "2": {}, "x": {}}}),
    ],
)
def test_added_tokens_that_a_sentencepiece_model_lacks(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: object
) -> None:
    shutil.copy(golden / "llama_ens" / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert find_tokenizer(tmp_path, 512) == tmp_path / "tokenizer.model"
    assert not caplog.records
    find_tokenizer(tmp_path, 576, allow_more_rows=True)
    assert "does not have the added tokens <|im_" in caplog.text
    assert "put the model's tokenizer.json beside it" in caplog.text


@pytest.mark.parametrize("content", [b"", b"hello, not a model", b"\x00" * 100])
def test_not_a_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not a SentencePiece model"):
        find_tokenizer(tmp_path, 512)


def test_one_folder_up(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(golden / "llama_ens" / "tokenizer.model", tmp_path)
    (tmp_path / "model").mkdir()
    above = tmp_path / "tokenizer.model"
    assert find_tokenizer(tmp_path / "model", 512) is None
    assert find_tokenizer(tmp_path / "model", 512, may_lie_above=True) == above
    assert find_tokenizer(tmp_path / "model", None, may_lie_above=True) is None  # nothing says that it fits
    assert find_tokenizer(tmp_path / "model", 600, may_lie_above=True) is None
    assert "is not used" in caplog.text
    assert "512 pieces but the embedding has 600 rows" in caplog.text


@pytest.mark.parametrize("format", ["sphinx", "meta", "sphinxkit"])
def test_layouts_of_llama2s_time_look_one_folder_up(golden: Path, tmp_path: Path, format: str) -> None:
    shutil.copy(golden / "llama_ens" / "tokenizer.model", tmp_path)
    with checkpoint.open(golden / "llama_ens") as opened:
        checkpoint.save(tmp_path / "model", opened, format=format, part="llm")
    with checkpoint.open(tmp_path / "model") as opened:
        assert opened.tokenizer_path == (None if format == "sphinxkit" else tmp_path / "tokenizer.model")
