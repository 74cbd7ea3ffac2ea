from __future__ import annotations

import json
from pathlib import Path

import pytest

from sphinxkit.checkpoint.formats.hf_companions import companion_files


@pytest.fixture
def tokenizer(golden: Path) -> dict[str, bytes]:
    return {"tokenizer.model": (golden / "llama_ens5/tokenizer.model").read_bytes()}


def test_made_from_the_tokenizer(tokenizer: dict[str, bytes]) -> None:
    ids, texts = companion_files(tokenizer, None, [])
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert sorted(texts) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(texts["generation_config.json"]) == ids
    assert companion_files(tokenizer, None, [2, 7])[0] == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert companion_files({}, None, []) == ({}, {})


def test_kept_from_the_models_folder(tmp_path: Path, tokenizer: dict[str, bytes]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer["tokenizer.model"])
    texts = {"generation_config.json": '{"temperature": 0.6}', "tokenizer_config.json": '{"chat_template": "x"}'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text('{"eos_token_id": 9, "pad_token_id": 3}')
    ids, found = companion_files(tokenizer, tmp_path, [])
    assert ids == {"bos_token_id": 1, "eos_token_id": 9, "pad_token_id": 3}
    assert found["generation_config.json"] == texts["generation_config.json"]
    config = json.loads(found["tokenizer_config.json"])
    assert (config["chat_template"], config["bos_token"]) == ("x", "<s>")
    (tmp_path / "tokenizer.json").write_text('{"theirs": 1}')
    assert companion_files(tokenizer, tmp_path, [])[1] == texts | {"tokenizer.json": '{"theirs": 1}'}


def test_a_tokenizer_that_cannot_be_followed_is_named(
    tokenizer: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    unigram = {"tokenizer.model": tokenizer["tokenizer.model"] + bytes([0x12, 2, 0x18, 1])}
    _, texts = companion_files(unigram, None, [])
    assert list(texts) == ["generation_config.json"]
    assert "has no exact tokenizer.json" in caplog.text
