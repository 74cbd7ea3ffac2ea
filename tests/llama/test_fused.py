from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.llama import LlamaModel

# a joint product may sum in another order: 1e-7 of logits of about 3, over two layers
LOGITS_TOLERANCE = 1e-5
# bfloat16 rounds to 2^-9 of each number; see test_model.py
BF16_RELATIVE_TOLERANCE = 0.06
GROUPS = ("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("mlp.gate_proj", "mlp.up_proj")

Builder = Callable[..., LlamaModel]


@pytest.fixture
def pair(small_llama: Builder) -> tuple[LlamaModel, LlamaModel]:
    """The same model twice; the second is fused."""
    plain, fused = (small_llama().requires_grad_(False) for _ in range(2))
    fused.fuse()
    return plain, fused


def embeds_of(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, 32, generator=torch.Generator().manual_seed(seed))


def greedy(model: LlamaModel, prompts: Tensor, lengths: list[int], new: int) -> Tensor:
    """Token ids (B, new) after prompts of different lengths."""
    cache = model.make_cache(len(lengths))
    last = torch.tensor(lengths) - 1
    logits = model(model.embed(prompts), cache=cache, lengths=lengths, output_positions=last)
    tokens = [logits.argmax(-1)]
    for _ in range(new - 1):
        tokens.append(model(model.embed(tokens[-1]), cache=cache).argmax(-1))
    return torch.cat(tokens, 1)


def count_module_calls(model: LlamaModel) -> list[int]:
    """A list that gets an entry whenever the first layer's module runs."""
    calls: list[int] = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_logits_and_cache_are_those_of_the_modules(pair: tuple[LlamaModel, LlamaModel]) -> None:
    results = []
    for model in pair:
        calls = count_module_calls(model)
        cache = model.make_cache(2)
        parts = [model(embeds_of(2, 5), cache=cache, lengths=[5, 3])]
        parts += [model(embeds_of(2, width, width), cache=cache) for width in (1, 4, 1)]
        results.append((torch.cat(parts, 1), cache.keys[1][:, :, :9], cache.values[0][:, :, :9]))
        assert bool(calls) == (model is pair[0])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_greedy_tokens_are_the_same(small_llama: Builder, num_kv_heads: int) -> None:
    prompts = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    model = small_llama(num_kv_heads=num_kv_heads).requires_grad_(False)
    plain = greedy(model, prompts, [9, 4, 1], 30)
    model.fuse()
    assert torch.equal(greedy(model, prompts, [9, 4, 1], 30), plain)


@pytest.mark.parametrize("pack", [False, True])
def test_bf16_stays_close_to_fp32(small_llama: Builder, pack: bool) -> None:
    half = small_llama().requires_grad_(False).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    half.fuse(pack=pack)
    calls = count_module_calls(half)
    embeds = embeds_of(2, 9).to(torch.bfloat16)
    expected = exact(embeds.float())
    cache = half.make_cache(2)
    parts = [half(piece, cache=cache) for piece in embeds.split([5, 1, 3], dim=1)]
    tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())
    torch.testing.assert_close(torch.cat(parts, 1).float(), expected, atol=tolerance, rtol=0)
    assert not calls


def test_the_state_dict_stays_and_no_memory_is_added(pair: tuple[LlamaModel, LlamaModel]) -> None:
    plain, fused = (model.state_dict() for model in pair)
    assert list(plain) == list(fused)
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    for group in GROUPS:
        assert len({fused[f"layers.1.{name}.weight"].untyped_storage().data_ptr() for name in group}) == 1
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in fused.values()}
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in plain.values())


def test_checkpoints_round_trip(pair: tuple[LlamaModel, LlamaModel], small_llama: Builder, tmp_path: Path) -> None:
    plain, fused = pair
    torch.save(fused.state_dict(), tmp_path / "model.pt")
    other = small_llama(seed=5).requires_grad_(False)
    other.fuse()
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    cache, expected_cache = other.make_cache(1), plain.make_cache(1)
    calls = count_module_calls(other)
    got, expected = other(embeds_of(1, 6), cache=cache), plain(embeds_of(1, 6), cache=expected_cache)
    assert not calls  # loading in place keeps the weights joined
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model.layers[1].mlp, "up_proj", copy.deepcopy(model.layers[1].mlp.up_proj)),
        lambda model: setattr(model.layers[1].attention, "o_proj", nn.Sequential(model.layers[1].attention.o_proj)),
    ],
    ids=["to", "assign", "replaced", "wrapped"],
)
def test_weights_that_moved_go_through_the_modules(
    pair: tuple[LlamaModel, LlamaModel], change: Callable[[LlamaModel], object]
) -> None:
    plain, fused = pair
    change(fused)
    calls = count_module_calls(fused)
    with torch.no_grad():
        fused.layers[1].mlp_norm.weight.mul_(1.5)
        plain.layers[1].mlp_norm.weight.mul_(1.5)
    got = fused(embeds_of(1, 6), cache=fused.make_cache(1))
    torch.testing.assert_close(got, plain(embeds_of(1, 6)), atol=LOGITS_TOLERANCE, rtol=0)
    assert calls


def test_copies_are_not_joined_and_right(pair: tuple[LlamaModel, LlamaModel]) -> None:
    plain, fused = pair
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        calls = count_module_calls(model)
        got = model(embeds_of(1, 6), cache=model.make_cache(1))
        torch.testing.assert_close(got, plain(embeds_of(1, 6)), atol=LOGITS_TOLERANCE, rtol=0)
        assert calls


def test_training_a_fused_model_is_training_a_plain_one(small_llama: Builder) -> None:
    plain, fused = small_llama(), small_llama()
    fused.fuse()
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(model.embed(torch.arange(8)[None])).square().mean().backward()
        optimizer.step()
    for one, two in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, two)
    # what was learnt is seen by the joint weights
    calls = count_module_calls(fused)
    got = fused(embeds_of(1, 6), cache=fused.make_cache(1))
    assert not calls
    torch.testing.assert_close(got, plain(embeds_of(1, 6)), atol=LOGITS_TOLERANCE, rtol=0)


def test_packing_elsewhere_is_refused(small_llama: Builder) -> None:
    with pytest.raises(TypeError, match=r"only 16-bit weights on a CPU can be packed, got torch.float32 on cpu"):
        small_llama().fuse(pack=True)


def test_wrapped_layers_are_refused(small_llama: Builder) -> None:
    model = small_llama()
    model.layers[0].attention.q_proj = nn.Sequential(model.layers[0].attention.q_proj)
    with pytest.raises(TypeError, match="only plain linear layers can be fused, but q_proj is Sequential"):
        model.fuse()
    model.layers[0].attention = nn.Identity()
    with pytest.raises(TypeError, match="expected a LLaMA layer, got Identity and SwiGLU"):
        model.fuse()
