"""Fused layers and what becomes of them when the model changes."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.acceleration import BlockedAttention, FusedAccelerator, fused
from sphinxkit.acceleration.accelerator import obstacle
from sphinxkit.acceleration.fused import FusedLayers
from sphinxkit.llama import AttentionContext, KVCache, LlamaModel
from tests.acceleration.conftest import embeds_of, logits_of

# a joint product may sum in another order: 1e-7 of logits of about 3, over two layers
LOGITS_TOLERANCE = 1e-5
# bfloat16 rounds to 2^-9 of each number; see tests/llama/test_model.py
BF16_RELATIVE_TOLERANCE = 0.06

Builder = Callable[..., LlamaModel]


@pytest.fixture
def pair(ready_llama: Builder) -> tuple[LlamaModel, LlamaModel]:
    """The same model twice; the second has generated text through fused layers."""
    plain, fast = ready_llama(), ready_llama(FusedAccelerator())
    logits_of(fast, embeds_of(1, 3))
    return plain, fast


def is_fused(model: LlamaModel) -> bool:
    assert isinstance(model.accelerator, FusedAccelerator)
    return model.accelerator.current(model) is not None


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE, rtol=0)


def greedy(model: LlamaModel, prompts: Tensor, lengths: list[int], new: int) -> Tensor:
    """Token ids (B, new) after prompts of different lengths."""
    cache = model.make_cache(len(lengths))
    tokens = [model.prefill(model.embed(prompts), cache, lengths).argmax(-1)]
    for _ in range(new - 1):
        tokens.append(model.decode(tokens[-1], cache).argmax(-1))
    return torch.cat(tokens, 1)


class TestNumbers:
    def test_logits_and_cache_are_those_of_the_modules(
        self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int]
    ) -> None:
        results = []
        for model in pair:
            module_calls.clear()
            cache = model.make_cache(2)
            parts = [model.prefill(embeds_of(2, 5), cache, [5, 3], all_positions=True)]
            parts.append(model.prefill(embeds_of(2, 4, 4), cache, [4, 2]))
            parts += [model.prefill(embeds_of(2, width, width), cache, all_positions=True) for width in (1, 4, 1)]
            parts.append(model.decode(torch.tensor([[7], [9]]), cache))
            results.append((torch.cat(parts, 1), cache.keys[1][:, :, :9], cache.values[0][:, :, :9], cache.lengths))
            assert bool(module_calls) == (model is pair[0])
        for one, two in zip(*results, strict=True):
            close(one, two)

    @pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
    def test_greedy_tokens_are_the_same(self, ready_llama: Builder, num_kv_heads: int) -> None:
        prompts = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1))
        model = ready_llama(num_kv_heads=num_kv_heads)
        plain = greedy(model, prompts, [9, 4, 1], 30)
        model.accelerator = FusedAccelerator()
        assert torch.equal(greedy(model, prompts, [9, 4, 1], 30), plain)
        assert is_fused(model)

    def test_bf16_stays_close_to_fp32(self, ready_llama: Builder, module_calls: list[int]) -> None:
        half = ready_llama(FusedAccelerator()).to(torch.bfloat16)
        exact = copy.deepcopy(half).float()
        embeds = embeds_of(2, 9).to(torch.bfloat16)
        expected = exact(embeds.float())
        module_calls.clear()
        got = logits_of(half, embeds, 5, 1, 3)
        assert not module_calls
        tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())
        torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=0)

    def test_forward_and_training_stay_plain(
        self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int]
    ) -> None:
        plain, fast = pair
        for model in pair:
            assert torch.equal(model(embeds_of(1, 6)), plain(embeds_of(1, 6)))
            assert torch.equal(model(embeds_of(1, 6), cache=model.make_cache(1)), plain(embeds_of(1, 6)))
        assert len(module_calls) == 2 * 2 * 4
        assert is_fused(fast)


class TestPreparation:
    def test_it_happens_with_the_first_prompt_and_once(
        self, ready_llama: Builder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[FusedLayers] = []

        class Counted(FusedLayers):
            def __init__(self, model: LlamaModel, **options: bool) -> None:
                made.append(self)
                super().__init__(model, **options)

        monkeypatch.setattr("sphinxkit.acceleration.accelerator.FusedLayers", Counted)
        model = ready_llama(FusedAccelerator())
        cache = model.make_cache(1)
        model(embeds_of(1, 4), cache=cache)
        model.decode(torch.tensor([[3]]), cache)
        assert not made  # a prompt that somebody else has read
        for _ in range(2):
            logits_of(model, embeds_of(1, 3), 2, 1)
        assert len(made) == 1

    def test_four_threads_may_start_together(self, ready_llama: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
        made, barrier = [], threading.Barrier(4)
        plain = ready_llama()
        expected = logits_of(plain, embeds_of(1, 9), 6, 1, 2)
        right = fused._fuse

        def slow(*arguments: object) -> object:
            made.append(threading.get_ident())
            barrier_passed.wait(0.05)  # lets the others run into the lock
            return right(*arguments)  # type: ignore[arg-type]

        barrier_passed = threading.Event()
        monkeypatch.setattr(fused, "_fuse", slow)
        model, found = ready_llama(FusedAccelerator()), []

        def run() -> None:
            barrier.wait()
            found.append(logits_of(model, embeds_of(1, 9), 6, 1, 2))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 2  # two layers, once each
        assert len(found) == 4
        for got in found:
            close(got, expected)

    def test_in_inference_mode_the_weights_stay_trainable(self, ready_llama: Builder) -> None:
        model = ready_llama(FusedAccelerator()).requires_grad_(True)
        with torch.inference_mode():
            logits_of(model, embeds_of(1, 3))
        assert is_fused(model)
        model(embeds_of(1, 3)).sum().backward()
        assert model.layers[0].get_parameter("attention.q_proj.weight").grad is not None

    def test_a_model_in_training_mode_is_left_alone(
        self, ready_llama: Builder, module_calls: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = ready_llama(FusedAccelerator()).train()
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                logits_of(model, embeds_of(1, 3))
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
        assert len(module_calls) == 4
        assert [record.message for record in caplog.records] == [
            "text is generated through the plain modules: the model is in training mode"
        ]
        logits_of(model.eval(), embeds_of(1, 3))
        assert is_fused(model)
        logits_of(model.train(), embeds_of(1, 3))
        assert len(module_calls) == 6

    def test_attention_in_blocks_is_taken_where_the_choice_is_ours(
        self, ready_llama: Builder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[object] = []
        right = LlamaModel.attention_context

        def spy(self: LlamaModel, embeds: Tensor, **options: object) -> AttentionContext:
            found = right(self, embeds, **options)  # type: ignore[arg-type]
            seen.append(type(found.backend))
            return found

        monkeypatch.setattr(LlamaModel, "attention_context", spy)
        for name in ("auto", "sdpa", "eager", "sphinxkit.acceleration:BlockedAttention"):
            logits_of(ready_llama(FusedAccelerator(), attention=name), embeds_of(1, 3))
        names = [kind.__name__ for kind in seen]  # type: ignore[attr-defined]
        assert names == ["BlockedAttention", "SDPAAttention", "EagerAttention", "BlockedAttention"]
        assert seen[0] is BlockedAttention


class TestWeights:
    def test_the_state_dict_stays_and_no_memory_is_added(self, pair: tuple[LlamaModel, LlamaModel]) -> None:
        plain, fast = (model.state_dict() for model in pair)
        assert list(plain) == list(fast)
        assert all(torch.equal(plain[name], fast[name]) for name in plain)
        layer = pair[1].layers[1]
        for group in (("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            weights = [layer.get_parameter(f"{name}.weight") for name in group]
            ends = [weight.data_ptr() + weight.nbytes for weight in weights]
            assert [weight.data_ptr() for weight in weights[1:]] == ends[:-1]
        for tensor in fast.values():  # each can be saved by itself
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    def test_checkpoints_round_trip(
        self, pair: tuple[LlamaModel, LlamaModel], ready_llama: Builder, module_calls: list[int], tmp_path: Path
    ) -> None:
        plain, fast = pair
        torch.save(fast.state_dict(), tmp_path / "model.pt")
        assert (tmp_path / "model.pt").stat().st_size < 1.5 * sum(p.nbytes for p in plain.parameters())
        other = ready_llama(FusedAccelerator(), seed=5)
        logits_of(other, embeds_of(1, 3))
        other.load_state_dict(torch.load(tmp_path / "model.pt"))
        expected = logits_of(plain, embeds_of(1, 6))
        module_calls.clear()
        close(logits_of(other, embeds_of(1, 6)), expected)
        assert not module_calls  # loading in place keeps the weights joined

    @pytest.mark.parametrize("through_data", [False, True])
    @pytest.mark.parametrize("name", ["attention.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp_norm"])
    def test_changes_in_place_are_seen(
        self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int], name: str, through_data: bool
    ) -> None:
        before = logits_of(pair[0], embeds_of(1, 6))
        for model in pair:
            weight = model.layers[1].get_parameter(f"{name}.weight")
            if through_data:
                weight.data.mul_(1.5)
            else:
                with torch.no_grad():
                    weight.mul_(1.5)
        expected = logits_of(pair[0], embeds_of(1, 6))
        assert not torch.allclose(before, expected, atol=100 * LOGITS_TOLERANCE)
        module_calls.clear()
        close(logits_of(pair[1], embeds_of(1, 6)), expected)
        assert not module_calls

    def test_a_tensor_that_shares_a_weights_memory_goes_on_sharing_it(
        self, ready_llama: Builder, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A state dict taken before the first text: whoever changes it changes the model, as ever."""
        plain, model = ready_llama(), ready_llama(FusedAccelerator())
        state = model.state_dict()
        with caplog.at_level(logging.INFO):
            logits_of(model, embeds_of(1, 3))
        assert "another tensor shares the memory of the weight of q_proj" in caplog.text
        for each in (state, plain.state_dict()):
            each["layers.0.attention.q_proj.weight"].mul_(1.5)
            each["lm_head.weight"].mul_(0.5)
        close(logits_of(model, embeds_of(1, 6)), logits_of(plain, embeds_of(1, 6)))
        assert not is_fused(model)
        del state, each
        close(logits_of(model, embeds_of(1, 6)), logits_of(plain, embeds_of(1, 6)))
        assert is_fused(model)

    def test_an_output_matrix_that_is_shared_is_not_moved(self, ready_llama: Builder) -> None:
        model = ready_llama(FusedAccelerator())
        view = model.lm_head.weight.data
        logits_of(model, embeds_of(1, 3))
        assert is_fused(model)
        assert model.lm_head.weight.data_ptr() == view.data_ptr()

    def test_copies_and_pickles_prepare_themselves(
        self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int]
    ) -> None:
        plain, fast = pair
        pickled = pickle.dumps(fast)
        assert len(pickled) < 1.5 * sum(parameter.nbytes for parameter in plain.parameters())
        expected = logits_of(plain, embeds_of(1, 6))
        for model in (copy.deepcopy(fast), pickle.loads(pickled)):
            assert not is_fused(model)
            assert model.accelerator is not fast.accelerator
            with torch.no_grad():
                fast.layers[0].get_parameter("mlp_norm.weight").mul_(1.01)  # the copy's own is another
            module_calls.clear()
            close(logits_of(model, embeds_of(1, 6)), expected)
            assert not module_calls
            assert is_fused(model)
        assert is_fused(fast)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.to(torch.float64).to(torch.float32),
            lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
            lambda model: setattr(model.layers[1].mlp, "up_proj", copy.deepcopy(model.layers[1].mlp.up_proj)),
            lambda model: setattr(model.layers[1].mlp.up_proj, "weight", nn.Parameter(model.state_dict()[UP].clone())),
            lambda model: setattr(model.layers[1].mlp.up_proj.weight, "data", model.state_dict()[UP].clone()),
            lambda model: setattr(model, "lm_head", copy.deepcopy(model.lm_head)),
        ],
        ids=["to", "assign", "replaced", "parameter", "data", "head"],
    )
    def test_moved_and_replaced_weights(
        self, pair: tuple[LlamaModel, LlamaModel], change: Callable[[LlamaModel], object], module_calls: list[int]
    ) -> None:
        """The next token goes through the modules, the next prompt through weights joined anew."""
        plain, fast = pair
        cache = {id(model): model.make_cache(1) for model in pair}
        for model in pair:
            model.prefill(embeds_of(1, 4), cache[id(model)])
        change(fast)
        for model in pair:
            with torch.no_grad():
                model.layers[1].get_parameter("mlp.up_proj.weight").mul_(1.5)
                model.lm_head.weight.mul_(0.5)
        assert not is_fused(fast)
        module_calls.clear()
        token = torch.tensor([[3]])
        close(fast.decode(token, cache[id(fast)]), plain.decode(token, cache[id(plain)]))
        assert len(module_calls) == 4
        expected = logits_of(plain, embeds_of(1, 6))
        module_calls.clear()
        close(logits_of(fast, embeds_of(1, 6)), expected)
        assert not module_calls
        assert is_fused(fast)

    def test_training_after_text_is_training_a_plain_one(self, small_llama: Builder, module_calls: list[int]) -> None:
        plain, fast = small_llama().eval(), small_llama().eval()
        fast.accelerator = FusedAccelerator()
        logits_of(fast, embeds_of(1, 3))
        for model in (plain, fast):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(model.embed(torch.arange(8)[None])).square().mean().backward()
            optimizer.step()
        for one, two in zip(plain.parameters(), fast.parameters(), strict=True):
            assert torch.equal(one, two)
        # what was learnt is seen by the joint weights
        expected = logits_of(plain, embeds_of(1, 6))
        module_calls.clear()
        close(logits_of(fast, embeds_of(1, 6)), expected)
        assert not module_calls


UP = "layers.1.mlp.up_proj.weight"


class TestListeners:
    """Whatever wants the modules to be called gets that, and no longer than it is there."""

    @pytest.mark.parametrize("path", ["layers.0", "layers.1.attention.q_proj", "layers.1.mlp_norm", "lm_head", ""])
    def test_hooks(self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int], path: str) -> None:
        plain, fast = pair
        expected = logits_of(plain, embeds_of(1, 6))
        seen: list[str] = []
        handle = fast.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
        module_calls.clear()
        close(logits_of(fast, embeds_of(1, 6)), expected)
        assert seen
        assert module_calls
        handle.remove()
        module_calls.clear()
        close(logits_of(fast, embeds_of(1, 6)), expected)
        assert not module_calls

    @pytest.mark.parametrize("path", ["norm", "embed_tokens"])
    def test_hooks_on_what_is_called_anyway(
        self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int], path: str
    ) -> None:
        plain, fast = pair
        for model in pair:
            model.get_submodule(path).register_forward_hook(lambda module, given, out: out * 1.5)
        expected = logits_of(plain, plain.embed(torch.arange(6)[None]))
        module_calls.clear()
        close(logits_of(fast, fast.embed(torch.arange(6)[None])), expected)
        assert not module_calls

    def test_hooks_that_change_the_output_and_come_first(self, ready_llama: Builder) -> None:
        plain, fast = ready_llama(), ready_llama(FusedAccelerator())
        for model in (plain, fast):
            model.layers[0].register_forward_hook(lambda module, given, out: out * 1.5)
        close(logits_of(fast, embeds_of(1, 6), 4, 1, 1), logits_of(plain, embeds_of(1, 6), 4, 1, 1))
        assert not is_fused(fast)

    def test_hooks_of_all_modules(self, pair: tuple[LlamaModel, LlamaModel]) -> None:
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        try:
            logits_of(pair[1], embeds_of(1, 6))
        finally:
            handle.remove()
        assert seen.count("SwiGLU") == 2

    def test_forward_set_on_a_module(self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int]) -> None:
        plain, fast = pair
        for model in pair:
            model.layers[1].mlp.forward = lambda x: x * 0.1  # type: ignore[method-assign, assignment]
        close(logits_of(fast, embeds_of(1, 6)), logits_of(plain, embeds_of(1, 6)))
        del fast.layers[1].mlp.forward
        module_calls.clear()
        logits_of(fast, embeds_of(1, 6))
        assert not module_calls


class TestAdapters:
    def test_wrapped_layers(self, pair: tuple[LlamaModel, LlamaModel], module_calls: list[int]) -> None:
        class Adapter(nn.Module):
            def __init__(self, inner: nn.Linear) -> None:
                super().__init__()
                self.inner, self.scale = inner, 1.25

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * self.scale

        plain, fast = pair
        for model in pair:
            attention = model.layers[0].attention
            attention.q_proj = Adapter(attention.q_proj)  # type: ignore[assignment, arg-type]
        expected = logits_of(plain, embeds_of(1, 6), 4, 2)
        module_calls.clear()
        close(logits_of(fast, embeds_of(1, 6), 4, 2), expected)
        assert len(module_calls) == 4
        for model in pair:  # merged and taken off
            attention = model.layers[0].attention
            attention.q_proj = attention.q_proj.inner
            with torch.no_grad():
                attention.q_proj.weight.mul_(1.25)
        module_calls.clear()
        close(logits_of(fast, embeds_of(1, 6), 4, 2), expected)
        assert not module_calls

    def test_parametrised_weights(self, pair: tuple[LlamaModel, LlamaModel]) -> None:
        class Half(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight / 2

        for model in pair:
            nn.utils.parametrize.register_parametrization(model.layers[0].mlp.down_proj, "weight", Half())
        close(logits_of(pair[1], embeds_of(1, 6), 4, 2), logits_of(pair[0], embeds_of(1, 6), 4, 2))
        assert not is_fused(pair[1])

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda m: setattr(m.layers[1], "mlp", nn.Identity()), "layers.1.mlp is a Identity"),
            (
                lambda m: setattr(m.layers[0].attention, "v_proj", nn.Sequential(m.layers[0].attention.v_proj)),
                "layers.0: v_proj is a Sequential, expected one without bias or adapter",
            ),
            (
                lambda m: setattr(m.layers[0].mlp, "up_proj", nn.Linear(32, 48)),
                "layers.0: up_proj is a Linear, expected",
            ),
            (lambda m: m.layers.append(nn.Identity()), "layers.2 is a Identity"),
            (lambda m: m.layers[0].register_forward_pre_hook(lambda *_: None), "a hook or a forward function was set"),
        ],
    )
    def test_obstacles_are_named(
        self, ready_llama: Builder, change: Callable[[LlamaModel], object], reason: str
    ) -> None:
        model = ready_llama()
        assert obstacle(model) is None
        change(model)
        assert str(obstacle(model)).startswith(reason)

    def test_a_class_of_its_own_is_an_obstacle(self, ready_llama: Builder) -> None:
        class Other(LlamaModel):
            pass

        model = ready_llama()
        model.__class__ = Other
        assert obstacle(model) == "the model is a Other"

    def test_weights_that_cannot_be_joined_are_named_and_nothing_moves(self, ready_llama: Builder) -> None:
        class Sharded(Tensor):
            pass

        model = ready_llama()
        down = model.layers[1].mlp.down_proj
        plain = down.weight
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        down._parameters["weight"] = plain.data.as_subclass(Sharded)  # type: ignore[assignment]
        with pytest.raises(TypeError, match="only plain weights can be joined, but that of down_proj is Sharded"):
            FusedLayers(model)
        down._parameters["weight"] = model.layers[0].mlp.down_proj.weight
        with pytest.raises(TypeError, match="another tensor shares the memory of the weight of down_proj"):
            FusedLayers(model)
        down._parameters["weight"] = plain
        plain.data.share_memory_()
        with pytest.raises(TypeError, match="the weight of down_proj is in memory shared with other processes"):
            FusedLayers(model)
        moved = {
            index for index, parameter in enumerate(model.parameters()) if parameter.data_ptr() != addresses[index]
        }
        assert len(moved) <= 1  # share_memory_ itself


def test_a_cache_of_another_model_is_refused_before_anything_is_prepared(ready_llama: Builder) -> None:
    model = ready_llama(FusedAccelerator())
    with pytest.raises(ValueError, match="but the model has"):
        model.prefill(embeds_of(1, 3), KVCache(1, 1, 8, 2, 8))
    with pytest.raises(ValueError, match=r"expected token ids \(1, 1\), got \(1, 2\)"):
        model.decode(torch.tensor([[1, 2]]), model.make_cache(1, 8))
    assert not is_fused(model)
