"""A language model like Qwen3's (norms of queries and keys, its own head width, tied embeddings) in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.training import TrainPlan, train

QWEN3 = {"head_dim": 8, "qk_norm": True, "tie_embeddings": True, "rope_theta": 1e6, "norm_eps": 1e-6}
CURVE_ATOL = 1e-5  # float32 sums in another order; measured 5e-7


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.fixture
def qwen3(document: Any) -> dict[str, Any]:
    plan: dict[str, Any] = document(steps=4, save_every=None, export=True)
    model = plan["model"]
    return plan | {"model": {**model, "llm": {**model["llm"], **QWEN3}}}


def test_packed_rows_train_like_single_ones(qwen3: dict[str, Any], tmp_path: Path) -> None:
    """A pack of one token's room is a row of one sample."""
    model = sphinxkit.build(qwen3["model"])
    generator = torch.Generator().manual_seed(0)
    lens = [5, 9, 3]
    ids = torch.randint(512, (1, sum(lens)), generator=generator)
    with torch.no_grad():
        for layer in model.llm.layers:
            layer.attention.q_norm.weight.uniform_(0.5, 1.5, generator=generator)
        packed = model.llm(model.llm.embed(ids), seq_lens=lens)
        single = [model.llm(model.llm.embed(part)) for part in ids.split(lens, dim=1)]
    torch.testing.assert_close(packed, torch.cat(single, dim=1), atol=1e-6, rtol=0)


def test_low_rank_updates_are_trained_and_merged(qwen3: dict[str, Any], tmp_path: Path) -> None:
    plan = {**qwen3, "train": ["projectors"], "lora": {"rank": 2}, "output": str(tmp_path / "lora")}
    train(TrainPlan(**plan))
    losses = curve(tmp_path / "lora")
    assert losses[-1] < losses[0]
    loaded = sphinxkit.load(tmp_path / "lora" / "model")
    assert loaded.llm.lm_head.weight is loaded.llm.embed_tokens.weight
    assert loaded.llm.qk_norm


@pytest.mark.distributed
def test_tensor_parallelism_on_two(qwen3: dict[str, Any], run_processes: Any, tmp_path: Path) -> None:
    plan = {**qwen3, "max_grad_norm": 0.01}  # clipping sees every gradient
    train(TrainPlan(**plan | {"output": str(tmp_path / "one")}))
    run_processes(plan | {"output": str(tmp_path / "two"), "tensor_parallel": 2}, 2)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=CURVE_ATOL)
    one, two = (sphinxkit.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    # Adam divides by a gradient's own size, so rounding shows where that is small
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert any("q_norm" in name and not torch.equal(one[name], torch.ones_like(one[name])) for name in one)
