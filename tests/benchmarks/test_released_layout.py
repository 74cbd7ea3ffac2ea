from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import released_layout

MANIFEST: released_layout.Manifest = {
    "whole.weight": [[6], None],
    "rows.weight": [[4, 3], 0],
    "columns.weight": [[3, 8], 1],
}


def test_shards_merge_to_the_whole_and_replicas_are_equal(tmp_path: Path) -> None:
    total = released_layout.write_shards(MANIFEST, tmp_path, 2, torch.bfloat16)
    assert total == 2 * (6 + 12 + 24)
    shards = [
        torch.load(tmp_path / f"consolidated.0{rank}-of-02.model.pth", weights_only=True)["model"] for rank in (0, 1)
    ]
    assert [shard["rows.weight"].shape for shard in shards] == [(2, 3), (2, 3)]
    for name, (shape, dim) in MANIFEST.items():
        parts = [shard[name] for shard in shards]
        merged = parts[0] if dim is None else torch.cat(parts, dim)
        assert torch.equal(merged, released_layout.random_tensor(name, shape, torch.bfloat16))
    assert torch.equal(shards[0]["whole.weight"], shards[1]["whole.weight"])


def test_padded_tokenizer_has_the_size_and_encodes_as_before(golden: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model = (golden / "llama_ens_light" / "tokenizer.model").read_bytes()
    before = SentencePieceProcessor(model_proto=model)
    after = SentencePieceProcessor(model_proto=released_layout.pad_tokenizer(model, before.vocab_size(), 32000))
    assert after.vocab_size() == 32000
    text = "What is in this image? <unused777> 3.14\n### Assistant:"
    assert after.encode(text) == before.encode(text)
    assert after.id_to_piece(31999) == "<unused31999>"


def test_full_size_manifest_is_there(golden: Path) -> None:
    manifest = json.loads((golden / "manifests" / "llama_ens_light.json").read_text())
    assert manifest["llma.tok_embeddings.weight"] == [[32000, 2048], 1]
