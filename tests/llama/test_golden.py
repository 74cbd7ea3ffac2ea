"""Text-only logits of the public implementation, from its own shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sphinxkit.llama import LlamaModel, llama

# repeat runs of the public implementation agree bitwise, its two-way tensor parallel to 8e-6 (logits of about 8)
LOGITS_TOLERANCE = 1e-4
CHECKPOINTS = ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light"]
NAMES = {
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "ffn_norm": "mlp_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    **{f"attention.w{letter}": f"attention.{letter}_proj" for letter in "qkvo"},
}


def merged(folder: Path, split: dict[str, int]) -> dict[str, Tensor]:
    """The language model's part of all shards, concatenated, under our names."""
    shards = [torch.load(path, weights_only=True)["model"] for path in sorted(folder.glob("consolidated.*.pth"))]
    tensors: dict[str, Tensor] = {}
    for name in shards[0]:
        own = name.removeprefix("llma.")
        if not own.startswith(("layers.", "tok_embeddings.", "output.", "norm.")):
            continue
        for old, new in NAMES.items():
            own = own.replace(old, new)
        parts = [shard[name] for shard in shards]
        tensors[own] = torch.cat(parts, split[name]) if name in split else parts[0]
    return tensors


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, golden: Path) -> tuple[LlamaModel, dict[str, Tensor], dict]:
    folder = golden / request.param
    facts = json.loads((folder / "golden.json").read_text())
    config = facts["config"]
    model = llama(
        embed_dim=config["dim"],
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        num_kv_heads=config.get("n_kv_heads"),
        multiple_of=config["multiple_of"],
        ffn_dim_multiplier=config.get("ffn_dim_multiplier"),
        norm_eps=config["norm_eps"],
        rope_theta=config.get("rope_theta", 10000.0),
        vocab_size=facts["tokenizer"]["n_words"],
        max_seq_len=facts["max_seq_len"],
    )
    model.load_state_dict(merged(folder, facts["tp_split_dim"]), strict=True)
    return model.requires_grad_(False), load_file(folder / "golden.safetensors"), facts


def test_logits_of_a_text(case: tuple[LlamaModel, dict[str, Tensor], dict]) -> None:
    model, tensors, _ = case
    logits = model(model.embed(tensors["logits.tokens"]))
    torch.testing.assert_close(logits, tensors["logits.text_only"], atol=LOGITS_TOLERANCE, rtol=0)


def test_logits_through_the_cache(case: tuple[LlamaModel, dict[str, Tensor], dict]) -> None:
    model, tensors, _ = case
    tokens = tensors["logits.tokens"]
    cache = model.make_cache(len(tokens), tokens.shape[1])
    model(model.embed(tokens[:, :11]), cache=cache)
    last = model(model.embed(tokens[:, 11:]), cache=cache, output_positions=slice(-1, None))
    torch.testing.assert_close(last[:, 0], tensors["logits.forward_inference_text"], atol=LOGITS_TOLERANCE, rtol=0)


def test_greedy_tokens_of_ragged_prompts(case: tuple[LlamaModel, dict[str, Tensor], dict]) -> None:
    model, tensors, facts = case
    run = next(run for run in facts["generate"] if run["name"] == "text")
    matrix = tensors["generate.text.full_token_matrix"]
    prompts = torch.tensor(run["prompt_lengths"])
    assert prompts[0] != prompts[1]
    cache = model.make_cache(2, matrix.shape[1])
    width = int(prompts.max())
    logits = model(model.embed(matrix[:, :width]), cache=cache, lengths=prompts, output_positions=prompts - 1)
    room = matrix.shape[1] - prompts  # tokens that each row was given beyond its prompt
    for index in range(int(room.max())):
        running = index < room
        chosen = logits[:, 0].argmax(-1)
        expected = matrix[torch.arange(2), (prompts + index).clamp(max=matrix.shape[1] - 1)]
        assert torch.equal(chosen[running], expected[running])
        logits = model(model.embed(chosen[:, None]), cache=cache, lengths=running.long())
