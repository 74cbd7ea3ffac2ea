"""The memory of a run, beside counts by hand."""

from __future__ import annotations

import pytest
import torch

from sphinxkit.errors import DataError
from sphinxkit.recipe import build
from sphinxkit.training import TrainPlan
from sphinxkit.training.memory import TrainingMemory, estimate_training


def count(document, *parts: str) -> int:
    model = build(document()["model"], device="meta")
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(parts))


def estimate(document, processes: int = 1, **changes) -> TrainingMemory:
    return estimate_training(TrainPlan(**document(**changes)), processes=processes, text_tokens=20)


def test_float32_on_one_process_takes_16_bytes_for_a_weight(document) -> None:
    found = estimate(document)
    learnt, frozen = (
        count(document, "llm", "vision.branches.0.projector", "vision.start", "vision.end"),
        "vision.branches.0.enc",
    )
    assert found.weights == 4 * (learnt + count(document, frozen))
    assert (found.gradients, found.optimizer, found.gathered) == (4 * learnt, 8 * learnt, 0)
    assert found.total == found.weights + 12 * learnt + found.activations
    assert found.row_tokens == 256
    assert found.row_images == 256 // (20 + build(document()["model"], device="meta").vision.num_tokens)


def test_muon_keeps_one_moment_of_the_layers_matrices(document) -> None:
    adamw, muon = (estimate(document, optimizer=name) for name in ("adamw", "muon"))
    llm = build(document()["model"], device="meta").llm
    matrices = sum(p.numel() for name, p in llm.layers.named_parameters() if "norm" not in name)
    assert adamw.optimizer - muon.optimizer == 4 * matrices
    assert muon.gradients == adamw.gradients


@pytest.mark.slow
def test_the_experts_part_is_told(document) -> None:
    base = document()["model"]
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    model = {**base, "llm": {**base["llm"], "moe": moe}}
    experts = 4 * 3 * base["llm"]["num_layers"] * base["llm"]["embed_dim"] * base["llm"]["hidden_dim"]
    assert estimate(document).experts == 0
    assert estimate(document, model=model).experts == 16 * experts
    assert estimate(document, model=model, optimizer="muon", train=["llm"]).experts == 12 * experts
    frozen = estimate(document, 2, model=model, dtype="bfloat16", train=["projectors"])
    assert (frozen.experts, frozen.row_tokens) == (2 * experts // 2, 256)
    assert estimate(document, 2, model=model, tensor_parallel=2).experts == 8 * experts


def test_processes_share_all_but_the_encoders(document) -> None:
    one, four = (estimate(document, processes, dtype="bfloat16") for processes in (1, 4))
    encoders = 2 * count(document, "vision.branches.0.enc")
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=0.01)  # uneven shapes are rounded up
    assert four.weights - encoders == pytest.approx((one.weights - encoders) / 4, rel=0.01)
    assert four.gathered == one.gathered > 0
    assert four.activations == one.activations
    llm = estimate(document, 2, dtype="bfloat16", tensor_parallel=2, train=["llm"])
    assert llm.optimizer == pytest.approx(8 * count(document, "llm") / 2, rel=0.01)


def test_what_is_frozen_has_no_gradients(document) -> None:
    lora = estimate(document, train=[], lora={"rank": 2})
    tags = estimate(document, train=["image_delimiters"])
    assert 0 < lora.gradients < 4 * count(document, "llm") / 4
    assert tags.gradients == 4 * 2 * 16  # two tokens of width 16
    assert tags.weights == 4 * count(document, "llm", "vision")


@pytest.mark.slow
def test_checkpointing_and_shorter_rows_take_less(document) -> None:
    deep = document()["model"] | {"llm": document()["model"]["llm"] | {"num_layers": 8}}
    kept, again = (estimate(document, model=deep, activation_checkpointing=flag).activations for flag in (False, True))
    assert again < kept / 2
    assert estimate(document, model=deep, pack_tokens=128).activations < again
    # every layer's input is kept either way
    assert again > 8 * 256 * 16 * 4


def test_activations_are_what_a_step_holds(document) -> None:
    """The estimate of logits alone: with a wide vocabulary nothing else counts."""
    wide = document()["model"] | {"llm": document()["model"]["llm"] | {"vocab_size": 20_000}}
    found = estimate(document, model=wide, pack_tokens=512)
    learnt = 512 - found.row_images * build(document()["model"], device="meta").vision.num_tokens
    logits = learnt * 20_000 * torch.float32.itemsize
    assert 2 * logits < found.activations < 4 * logits  # they, their log-softmax, their gradient


def test_counts_are_checked(document) -> None:
    with pytest.raises(DataError, match="processes and text tokens of at least 1, got 0, 20"):
        estimate(document, 0)


def test_frozen_weights_take_the_bytes_of_their_dtype(document) -> None:
    """LoRA over a bfloat16 base: 2 bytes a frozen weight, 4 an update's."""
    changes = {"train": [], "lora": {"rank": 2, "targets": ["q_proj"]}}
    sixteen, thirty_two = (estimate(document, **changes, dtype=dtype) for dtype in ("bfloat16", "float32"))
    factors = sixteen.gradients
    assert factors == thirty_two.gradients > 0
    frozen = count(document, "llm", "vision")
    assert (sixteen.weights, thirty_two.weights) == (2 * frozen + factors, 4 * frozen + factors)


def test_a_row_holds_one_sample_at_least(document) -> None:
    slots = build(document()["model"], device="meta").vision.num_tokens
    found = estimate(document, pack_tokens=8)
    assert (found.row_tokens, found.row_images) == (slots + 20, 1)
