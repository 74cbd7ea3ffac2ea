"""Mixture of experts: the formula in float64, the public implementation's values, and what the options refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sphinxkit
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.llama import llama
from sphinxkit.llama.moe import MixtureOfExperts, MoEOptions, balance_loss, parse_moe

# float32 against float64, values of about 1
ATOL = 5e-6
GRADIENT_RTOL = 1e-5
# the router's gradient is exactly 0 for one expert a token
GRADIENT_NOISE = 1e-6
# golden values: README_MOE.md, section 7
LOGITS_ATOL, ROWS_ATOL = 1e-4, 1e-5


def oracle(moe: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token in float64: output and balance loss."""
    router = moe.router.weight.double()
    gate, up, down = (getattr(moe.experts, name).double() for name in ("gate_proj", "up_proj", "down_proj"))
    k, experts = moe.num_experts_per_tok, len(router)
    rows, counts, shares = [], torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
    for token in x.double().reshape(-1, x.shape[-1]):
        odds = (router @ token).exp()
        shares = shares + odds / odds.sum()
        best = odds.argsort(descending=True)[:k].tolist()
        total = sum(odds[e] for e in best)
        row = torch.zeros_like(token)
        for e in best:
            counts[e] += 1
            inner = gate[e] @ token
            row = row + odds[e] / total * (down[e].T @ (inner * inner.sigmoid() * (up[e] @ token)))
        rows.append(row)
    tokens = len(rows)
    return torch.stack(rows).view(x.shape), experts / (tokens * k) * (counts * shares / tokens).sum()


@pytest.mark.parametrize(
    ("experts", "per_token", "tokens"), [(4, 2, (2, 7)), (8, 3, (1, 40)), (5, 1, (3, 1)), (3, 3, (9,))]
)
def test_values_and_gradients_by_the_formula(experts: int, per_token: int, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(sum(tokens))
    moe = MixtureOfExperts(12, 10, MoEOptions(experts, per_token))
    x = torch.randn(*tokens, 12, requires_grad=True)
    losses: list[Tensor] = []
    found = moe(x, losses.append)
    wanted, wanted_loss = oracle(moe, x)
    torch.testing.assert_close(found.double(), wanted, atol=ATOL, rtol=0)
    torch.testing.assert_close(losses[0].double(), wanted_loss, atol=ATOL, rtol=0)
    weighing = torch.randn(found.shape)
    inputs = [x, *moe.parameters()]
    ours = torch.autograd.grad((found * weighing).sum() + losses[0], inputs)
    theirs = torch.autograd.grad((wanted * weighing.double()).sum() + wanted_loss, inputs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            own, other.to(own.dtype), rtol=0, atol=GRADIENT_RTOL * float(other.abs().max()) + 1e-9
        )


def test_an_expert_that_nobody_chose_has_a_gradient_of_zeros() -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(6, 4, MoEOptions(4, 1))
    moe(torch.randn(1, 6)).sum().backward()
    gradient = moe.experts.gate_proj.grad
    assert gradient is not None
    assert [bool(each.any()) for each in gradient].count(True) == 1


def test_balance_is_one_for_equal_shares() -> None:
    probabilities = torch.full((8, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    assert balance_loss(probabilities, chosen) == pytest.approx(1.0)
    assert balance_loss(torch.eye(4)[[0] * 8], torch.zeros(8, 1, dtype=torch.long)) == pytest.approx(4.0)


@pytest.fixture(scope="module")
def case(golden: Path) -> tuple[sphinxkit.sphinx_model.SphinxModel, dict[str, Tensor], dict]:
    folder = golden / "mixtral_sparse_ens5"
    tensors = load_file(folder / "golden.safetensors")
    return sphinxkit.load(folder, accelerate=None), tensors, json.loads((folder / "golden.json").read_text())


def test_routers_choose_what_the_public_implementation_chose(case) -> None:
    model, tensors, _ = case
    inputs: dict[int, Tensor] = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args, index=index: inputs.update({index: args[0]}))
        for index, layer in enumerate(model.llm.layers)
    ]
    tokens = tensors["logits.tokens"]
    with torch.no_grad():
        logits = model.llm(model.llm.embed(tokens))
    torch.testing.assert_close(logits, tensors["logits.text_only"], atol=LOGITS_ATOL, rtol=0)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(model.llm.layers):
        rows = inputs[index].reshape(-1, model.llm.embed_dim)
        chosen = layer.mlp.router(rows).topk(2, dim=-1).indices
        assert torch.equal(chosen, tensors[f"moe.layer{index}.topk"].reshape(chosen.shape))
    first = model.llm.layers[0].mlp
    shape = tensors["moe.layer0.input"].shape
    with torch.no_grad():
        out = first(tensors["moe.layer0.input"])
        found = first.router(tensors["moe.layer0.input"])
    torch.testing.assert_close(out, tensors["moe.layer0.output"].view(shape), atol=ROWS_ATOL, rtol=0)
    wanted = tensors["moe.layer0.router_logits"].view(found.shape)
    torch.testing.assert_close(found, wanted, atol=ROWS_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"num_experts": 8}, RegistryError, "moe: num_experts_per_tok is missing"),
        ({"num_experts": 8, "num_expert_per_tok": 2}, RegistryError, "unknown key 'num_expert_per_tok'; did you mean"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, ShapeError, "3 is more than num_experts 2"),
        ({"num_experts": 0, "num_experts_per_tok": 1}, ShapeError, "num_experts must be a whole number of at least 1"),
        (
            {"num_experts": 2, "num_experts_per_tok": 1, "load_balancing_weight": -1.0},
            ShapeError,
            "must be a number of at least 0, got -1.0",
        ),
        (8, ShapeError, "moe: expected a mapping"),
    ],
)
def test_options_that_are_refused(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_moe(value)  # type: ignore[arg-type]


def test_cached_decoding_equals_one_pass() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 12, "max_seq_len": 32}
    model = llama(**sizes, moe={"num_experts": 4, "num_experts_per_tok": 2}).requires_grad_(False)
    ids = torch.randint(30, (2, 9))
    whole = model(model.embed(ids))
    cache = model.make_cache(2, 9)
    parts = [model(model.embed(part), cache=cache) for part in ids.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=ROWS_ATOL, rtol=0)
