"""Muon beside AdamW: torch's own updates, runs that resume, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sphinxkit.errors import RecipeError
from sphinxkit.training import TrainingError, TrainPlan, read_log, train
from sphinxkit.training.muon import MuonAdamW, orthogonalize
from sphinxkit.training.optim import hidden_matrices, make_optimizer

BF16_ATOL = 0.02  # five Newton-Schulz steps in bfloat16, of matrices whose singular values are about 1

SHARED_ATOL = 3e-4  # float32 sums in another order, carried through 6 steps with five products in bfloat16

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "load_balancing_weight": 0.0}
SHAPES = ((8, 8), (8, 24), (24, 8), (8, 24))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_singular_values_are_about_one() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(1))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(batch).float())
        assert values.min() > 0.6
        assert values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.bfloat16))


def test_updates_are_those_of_torch() -> None:
    own, others = parameters(), parameters()
    vector, other_vector = (nn.Parameter(torch.ones(4)) for _ in range(2))
    ours = MuonAdamW(
        [
            {"params": own, "weight_decay": 0.1, "muon": True},
            {"params": [vector], "weight_decay": 0.0, "muon": False},
        ],
        lr=0.1,
    )
    theirs = torch.optim.Muon(others, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([other_vector], lr=0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        for one, two in zip([*own, vector], [*others, other_vector], strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        for optimizer in (ours, theirs, adam):
            optimizer.step()
    for one, two in zip(own, others, strict=True):
        assert torch.allclose(one, two, atol=3 * 0.1 * 0.2 * max(one.shape) ** 0.5 * BF16_ATOL)
    assert torch.equal(vector, other_vector)


def test_experts_in_one_parameter_are_updated_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(5)
    weights, gradients = (torch.randn(3, 8, 24, generator=generator) for _ in range(2))
    gradients[1] *= 100  # one norm over all experts would shrink the updates of the others
    joint, apart = nn.Parameter(weights.clone()), [nn.Parameter(weight.clone()) for weight in weights]
    joint.grad = gradients
    for parameter, gradient in zip(apart, gradients, strict=True):
        parameter.grad = gradient
    for parameters in ([joint], apart):
        MuonAdamW([{"params": parameters, "weight_decay": 0.1, "muon": True}], lr=0.1).step()
    assert torch.equal(joint, torch.stack(apart))
    assert not torch.equal(joint, weights)


def test_a_parameter_without_a_gradient_stays() -> None:
    (first, *_) = own = parameters()
    before = first.detach().clone()
    for parameter in own[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer = MuonAdamW([{"params": own, "weight_decay": 0.1, "muon": True}], lr=0.1)
    optimizer.step()
    assert torch.equal(first, before)
    assert first not in optimizer.state
    assert len(optimizer.state) == len(own) - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # in bfloat16 the weights are DTensors of one process
@pytest.mark.slow
def test_a_run_learns_and_resumes_bit_for_bit(document, tmp_path: Path, dtype: str) -> None:
    from tests.training.test_resume import exact

    plan = document(optimizer="muon", output=str(tmp_path / "one"), dtype=dtype)
    train(TrainPlan(**plan))
    straight = exact(tmp_path / "one")
    assert straight[-1]["loss"] < 0.9 * straight[0]["loss"]
    plan["output"] = str(tmp_path / "two")
    assert train(TrainPlan(**plan, stop_after=5)).status == "paused"
    assert train(TrainPlan(**plan)).status == "done"
    assert exact(tmp_path / "two") == straight


def test_the_language_models_layers_are_its_matrices(document) -> None:
    import sphinxkit

    llm = sphinxkit.llama.llama(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, hidden_dim=24)
    matrices = hidden_matrices(llm)
    plan = TrainPlan(**document(optimizer="muon"))
    optimizer = make_optimizer({"llm": list(llm.parameters())}, plan, matrices)
    muon = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
    rest = [p for group in optimizer.param_groups if not group["muon"] for p in group["params"]]
    assert len(muon) == 2 * 7  # q, k, v, o and three of SwiGLU
    assert all(p.ndim == 2 and 32 not in p.shape for p in muon)
    assert sum(p.numel() for p in (*muon, *rest)) == sum(p.numel() for p in llm.parameters())
    assert [p.shape for p in rest if p.ndim > 1] == [(32, 16), (32, 16)]


def test_what_it_refuses(document) -> None:
    with pytest.raises(TrainingError, match=r"muon: expected matrices, got a parameter of shape \(4,\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(4))], "muon": True}])
    with pytest.raises(RecipeError, match="optimizer: expected adamw or muon, got 'sgd'"):
        TrainPlan(**document(optimizer="sgd"))
    with pytest.raises(RecipeError, match="optimizer: muon is for the matrices of the language model"):
        TrainPlan(**document(optimizer="muon", train=["projectors"]))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "fsdp", "tensor", "moe"),
    [(2, 2, 1, None), (2, 1, 2, None), (4, 2, 2, None), (2, 2, 1, MOE), (2, 1, 2, MOE)],
)
def test_processes_that_share_matrices_compute_what_one_does(
    document, run_processes, tmp_path: Path, processes: int, fsdp: int, tensor: int, moe: dict[str, float] | None
) -> None:
    base = document(optimizer="muon", steps=6, save_every=None)
    base["model"] = {**base["model"], "llm": {**base["model"]["llm"], "moe": moe}}
    run_processes(base | {"output": str(tmp_path / "one")})
    shared = base | {"output": str(tmp_path / "shared"), "dp_shard": fsdp, "tensor_parallel": tensor}
    run_processes(shared | {"stop_after": 3}, processes)
    run_processes(shared, processes)
    expected, found = (read_log(tmp_path / name) for name in ("one", "shared"))
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([r[key] for r in expected], abs=SHARED_ATOL), key
