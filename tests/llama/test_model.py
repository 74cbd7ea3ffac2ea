from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.llama import KVCache, LlamaModel, llama, precompute_freqs_cis

# float32 sums in another order: 1e-7 of logits of about 3, over two layers
LOGITS_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-5
# bfloat16 rounds to 2^-9 of each number. About 14 roundings a layer of the running sum, two layers: a random walk of
# sqrt(28) * 2^-9 = 1 % of the logits' spread; the largest of thousands of logits lies 5 deviations out
BF16_RELATIVE_TOLERANCE = 0.06

Builder = Callable[..., LlamaModel]


@pytest.fixture(scope="module")
def model(small_llama: Builder) -> LlamaModel:
    return small_llama().requires_grad_(False)


def embeds_of(batch: int, width: int, seed: int) -> Tensor:
    return torch.randn(batch, width, 32, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE, rtol=0)


class TestLaws:
    @given(
        steps=st.integers(1, 3).flatmap(
            lambda rows: st.lists(st.lists(st.integers(0, 4), min_size=rows, max_size=rows), min_size=1, max_size=5)
        ),
        padding=st.integers(0, 2),
        static=st.booleans(),
    )
    def test_a_cache_changes_nothing(
        self, model: LlamaModel, steps: list[list[int]], padding: int, static: bool
    ) -> None:
        """Any cut of the rows into steps, each row at its own pace, with padding, in every layout."""
        totals = [sum(counts) for counts in zip(*steps, strict=True)]
        longest = max(1, *totals)  # the capacity: not a slot to spare
        embeds = embeds_of(len(totals), longest, 0)
        expected = model(embeds)
        cache = KVCache(2, len(totals), longest, 2, 8, static_shapes=static)
        done = [0] * len(totals)
        for counts in steps:
            width = max(1, *counts) + padding
            grid = torch.full((len(totals), width, 32), 3.0)
            for row, count in enumerate(counts):
                grid[row, :count] = embeds[row, done[row] : done[row] + count]
            told = None if set(counts) == {width} else counts
            logits = model(grid, cache=cache, lengths=told)
            for row, count in enumerate(counts):
                close(logits[row, :count], expected[row, done[row] : done[row] + count])
                done[row] += count
            assert cache.lengths.tolist() == done
        assert done == totals

    @given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
    def test_a_batch_is_its_rows(self, model: LlamaModel, lengths: list[int], seed: int) -> None:
        embeds = embeds_of(len(lengths), max(lengths), seed)
        together = model(embeds)
        for row, length in enumerate(lengths):
            close(together[row, :length], model(embeds[row : row + 1, :length])[0])

    @given(width=st.integers(2, 12), data=st.data())
    def test_later_tokens_never_change_earlier_logits(self, model: LlamaModel, width: int, data: st.DataObject) -> None:
        cut = data.draw(st.integers(1, width - 1))
        first = embeds_of(2, width, 0)
        second = first.clone()
        second[:, cut:] = embeds_of(2, width - cut, 1)
        one, two = model(first), model(second)
        close(one[:, :cut], two[:, :cut])
        assert not torch.allclose(one[:, cut:], two[:, cut:], atol=LOGITS_TOLERANCE)

    @given(seq_lens=st.lists(st.integers(1, 9), min_size=1, max_size=5), backend=st.sampled_from(["sdpa", "eager"]))
    def test_packed_samples_are_separate(self, small_llama: Builder, seq_lens: list[int], backend: str) -> None:
        model = small_llama(attention=backend).requires_grad_(False)
        embeds = embeds_of(1, sum(seq_lens), 5)
        packed = model(embeds, seq_lens=seq_lens)
        pieces = embeds.split(seq_lens, dim=1)
        close(packed, torch.cat([model(piece) for piece in pieces], dim=1))


class TestPositions:
    """Attention only sees differences of positions, so where they start is looked up and not inferred."""

    def freqs_cis(self, model: LlamaModel, embeds: Tensor, **options: object) -> Tensor:
        seen: list[Tensor] = []
        hook = model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].freqs_cis))
        model(embeds, **options)
        hook.remove()
        return seen[0]

    def test_they_restart_in_every_packed_sample(self, model: LlamaModel) -> None:
        expected = precompute_freqs_cis(torch.tensor([[0, 1, 2, 0, 0, 1]]), model.head_dim)
        assert torch.equal(self.freqs_cis(model, embeds_of(1, 6, 0), seq_lens=[3, 1, 2]), expected)

    def test_they_continue_from_each_rows_cached_tokens(self, model: LlamaModel) -> None:
        cache = model.make_cache(2)
        model(embeds_of(2, 4, 0), cache=cache, lengths=[4, 1])
        expected = precompute_freqs_cis(torch.tensor([[4, 5], [1, 2]]), model.head_dim)
        assert torch.equal(self.freqs_cis(model, embeds_of(2, 2, 1), cache=cache), expected)


class TestBackends:
    @pytest.mark.parametrize("seq_lens", [None, [4, 1, 6]])
    def test_sdpa_and_eager_agree_forward_and_backward(self, small_llama: Builder, seq_lens: list[int] | None) -> None:
        found = []
        for name in ("sdpa", "eager"):
            model = small_llama(attention=name)
            embeds = embeds_of(1, 11, 0).requires_grad_()
            logits = model(embeds, seq_lens=seq_lens)
            logits.square().mean().backward()
            found.append((logits.detach(), [embeds.grad, *(parameter.grad for parameter in model.parameters())]))
        close(found[0][0], found[1][0])
        for one, two in zip(found[0][1][:-1], found[1][1][:-1], strict=True):
            if one is not None or two is not None:  # the embedding table has none: embeds came from outside
                torch.testing.assert_close(one, two, atol=GRAD_TOLERANCE, rtol=0)

    def test_auto_is_sdpa_on_a_cpu(self, small_llama: Builder) -> None:
        assert torch.equal(
            small_llama(attention="auto")(embeds_of(2, 5, 0)), small_llama(attention="sdpa")(embeds_of(2, 5, 0))
        )

    def test_a_named_backend_that_cannot_run_is_an_error(self, small_llama: Builder) -> None:
        model = small_llama(attention="xformers")
        with pytest.raises(RegistryError, match="'xformers' cannot run on cpu"):
            model(embeds_of(1, 2, 0))

    def test_an_unknown_backend_is_refused_when_building(self, small_llama: Builder) -> None:
        with pytest.raises(RegistryError, match="unknown attention backend 'flash'"):
            small_llama(attention="flash")


class TestSixteenBit:
    @pytest.mark.parametrize("num_kv_heads", [2, 4])
    def test_bf16_stays_close_to_fp32(self, small_llama: Builder, num_kv_heads: int) -> None:
        half = small_llama(num_kv_heads=num_kv_heads).requires_grad_(False).to(torch.bfloat16)
        exact = copy.deepcopy(half).float()
        embeds = embeds_of(3, 40, 0).to(torch.bfloat16)
        expected = exact(embeds.float())
        tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())
        logits = half(embeds)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)
        cache = half.make_cache(3, dtype=torch.bfloat16)
        parts = [half(piece, cache=cache) for piece in embeds.split([30, 1, 1, 1, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1).float(), expected, atol=tolerance, rtol=0)

    def test_on_a_cpu_a_bf16_model_has_a_float32_cache(self, small_llama: Builder) -> None:
        model = small_llama().requires_grad_(False).to(torch.bfloat16)
        embeds = embeds_of(2, 9, 0).to(torch.bfloat16)
        cache = model.make_cache(2)
        assert cache.dtype == torch.float32
        assert model.make_cache(1, device="meta").dtype == torch.bfloat16
        parts = [model(piece, cache=cache) for piece in embeds.split([5, 1, 3], dim=1)]
        expected = model(embeds).float()
        tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())
        torch.testing.assert_close(torch.cat(parts, 1).float(), expected, atol=tolerance, rtol=0)

    def test_autocast_runs(self, small_llama: Builder) -> None:
        model = small_llama().requires_grad_(False)
        embeds = embeds_of(1, 9, 0)
        expected = model(embeds)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(embeds)
        tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


class TestBuilding:
    def test_state_dict_has_the_canonical_names_and_no_buffers(self, model: LlamaModel) -> None:
        layer = [
            "attention_norm.weight",
            *(f"attention.{name}_proj.weight" for name in "qkvo"),
            "mlp_norm.weight",
            *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        ]
        expected = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
        expected += [f"layers.{index}.{name}" for index in range(2) for name in layer]
        assert sorted(model.state_dict()) == sorted(expected)
        assert not list(model.buffers())

    @pytest.mark.parametrize("way", ["to_empty", "assign"])
    def test_a_model_built_on_meta_is_the_same_once_it_has_weights(self, small_llama: Builder, way: str) -> None:
        expected = small_llama().requires_grad_(False)
        sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 48}
        with torch.device("meta"):
            model = llama(**sizes, vocab_size=61, max_seq_len=64)
        assert all(parameter.is_meta for parameter in model.parameters())
        if way == "to_empty":
            model.to_empty(device="cpu").load_state_dict(expected.state_dict())
        else:
            model.load_state_dict(expected.state_dict(), assign=True)
        embeds = embeds_of(2, 64, 0)
        assert torch.equal(model(embeds), expected(embeds))

    def test_init_weights_fills_everything_from_its_generator(self, small_llama: Builder) -> None:
        with torch.device("meta"):
            model = llama(embed_dim=64, num_layers=2, num_heads=4, vocab_size=300)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.init_weights(torch.Generator().manual_seed(1))
        first = [parameter.clone() for parameter in model.parameters()]
        model.init_weights(torch.Generator().manual_seed(1))
        assert all(torch.equal(one, two) for one, two in zip(first, model.parameters(), strict=True))
        # 19 200 numbers: their deviation is within 2 % of the true one, four times what chance allows
        assert float(model.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        assert torch.equal(model.norm.weight, torch.ones(64))

    def test_deepcopy_gives_the_same_model(self, model: LlamaModel) -> None:
        embeds = embeds_of(1, 4, 0)
        assert torch.equal(copy.deepcopy(model)(embeds), model(embeds))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_heads": 5}, "embed_dim 32 cannot be divided among num_heads 5"),
            ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
            ({"embed_dim": 12, "num_heads": 4}, r"even head width, got 3 \(embed_dim 12 / num_heads 4\)"),
            ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
            ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
            ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(
        self, small_llama: Builder, change: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            small_llama(**change)


class TestOutputRows:
    def test_only_the_wanted_positions_pass_the_head(self, model: LlamaModel) -> None:
        embeds = embeds_of(3, 7, 0)
        full = model(embeds)
        seen: list[tuple[int, ...]] = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        model(embeds, output_positions=torch.tensor([6, 2, 0]))
        model(embeds, output_positions=slice(-2, None))
        assert seen == [(3, 1, 32), (3, 2, 32)]
        hook.remove()
        close(model(embeds, output_positions=torch.tensor([6, 2, 0]))[:, 0], full[[0, 1, 2], [6, 2, 0]])
        close(model(embeds, output_positions=torch.tensor([-1, -5, 0]))[:, 0], full[[0, 1, 2], [6, 2, 0]])
        close(model(embeds, output_positions=slice(-2, None)), full[:, -2:])
        pairs = torch.tensor([[6, 0], [2, 2], [0, 1]])
        close(model(embeds, output_positions=pairs), full[torch.arange(3)[:, None], pairs])

    def test_hidden_states_are_what_the_head_takes(self, model: LlamaModel) -> None:
        embeds = embeds_of(2, 5, 0)
        rows = torch.tensor([4, 1])
        hidden = model.hidden_states(embeds, output_positions=rows)
        assert hidden.shape == (2, 1, 32)
        assert torch.equal(model.lm_head(hidden), model(embeds, output_positions=rows))

    def test_rows_that_do_not_exist_are_refused(self, model: LlamaModel) -> None:
        embeds = embeds_of(3, 7, 0)
        with pytest.raises(ShapeError, match=r"output_positions must be \(3,\) or \(3, R\), got \(2,\)"):
            model(embeds, output_positions=torch.tensor([1, 2]))
        with pytest.raises(ShapeError, match=r"output_positions \[7, -8\] lie outside of the 7 positions"):
            model(embeds, output_positions=torch.tensor([7, 0, -8]))


class TestInputs:
    def test_embeddings_come_from_the_table(self, model: LlamaModel) -> None:
        ids = torch.tensor([[3, 60], [0, 3]])
        assert torch.equal(model.embed(ids), model.embed_tokens.weight[ids])

    def test_embeds_of_another_shape_are_refused(self, model: LlamaModel) -> None:
        for shape in [(2, 32), (1, 3, 31), (1, 0, 32)]:
            with pytest.raises(ShapeError, match=r"expected embeds \(B, S, 32\) with S at least 1, got \("):
                model(torch.zeros(shape))

    def test_longer_than_the_context_is_refused(self, model: LlamaModel) -> None:
        assert model(torch.zeros(1, 64, 32)).shape == (1, 64, 61)
        with pytest.raises(ShapeError, match="65 tokens is longer than max_seq_len 64"):
            model(torch.zeros(1, 65, 32))
        assert model(torch.zeros(1, 100, 32), seq_lens=[50, 50]).shape == (1, 100, 61)
        with pytest.raises(ShapeError, match="70 tokens is longer than max_seq_len 64"):
            model(torch.zeros(1, 100, 32), seq_lens=[30, 70])
        with pytest.raises(ShapeError, match="cache of 65 tokens was asked for, but the model's max_seq_len is 64"):
            model.make_cache(1, 65)
        with pytest.raises(ShapeError, match="cache of 80 tokens"):
            model(torch.zeros(1, 1, 32), cache=KVCache(2, 1, 80, 2, 8))

    def test_packed_lengths_must_fill_a_single_row(self, model: LlamaModel) -> None:
        with pytest.raises(ShapeError, match=r"sum to the 5 tokens given, got \[2, 2\] with sum 4"):
            model(torch.zeros(1, 5, 32), seq_lens=[2, 2])
        with pytest.raises(ShapeError, match=r"must be positive and sum to the 5 tokens given, got \[5, 0\]"):
            model(torch.zeros(1, 5, 32), seq_lens=[5, 0])
        with pytest.raises(ShapeError, match=r"come as one row, got 2 rows"):
            model(torch.zeros(2, 5, 32), seq_lens=[5])
        with pytest.raises(ShapeError, match="cannot be used together"):
            model(torch.zeros(1, 5, 32), seq_lens=[5], cache=model.make_cache(1))

    def test_a_cache_must_fit_the_model_and_the_rows(self, model: LlamaModel) -> None:
        with pytest.raises(ShapeError, match="2 rows were given, but the cache has 3"):
            model(torch.zeros(2, 1, 32), cache=model.make_cache(3))
        with pytest.raises(ShapeError, match=r"\(num_layers, head_dim\) \(3, 8\), but the model has \(2, 8\)"):
            model(torch.zeros(1, 1, 32), cache=KVCache(3, 1, 8, 2, 8))
        with pytest.raises(ShapeError, match="no cache was given"):
            model(torch.zeros(1, 2, 32), lengths=[1])

    def test_overflow_is_an_error_before_any_work(self, model: LlamaModel) -> None:
        cache = model.make_cache(2, 8)
        model(embeds_of(2, 6, 0), cache=cache, lengths=[6, 3])
        before = [tensor.clone() for tensor in cache.keys]
        with pytest.raises(ShapeError, match="row 0 holds 6 tokens and 3 more make 9, but its capacity is 8"):
            model(embeds_of(2, 3, 1), cache=cache)
        assert cache.lengths.tolist() == [6, 3]
        assert all(torch.equal(one, two) for one, two in zip(before, cache.keys, strict=True))


class TestTraining:
    def test_checkpointed_blocks_give_the_same_gradients(self, small_llama: Builder) -> None:
        grads = []
        for wrap in (False, True):
            model = small_llama()
            if wrap:
                for layer in model.layers:
                    inner = layer.forward
                    layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
            embeds = model.embed(torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0)))
            model(embeds, seq_lens=[4, 5]).square().mean().backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        for plain, wrapped in zip(*grads, strict=True):
            assert torch.equal(plain, wrapped)

    def test_every_parameter_learns(self, small_llama: Builder) -> None:
        model = small_llama()
        model(model.embed(torch.arange(8)[None])).square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())

    def test_nothing_is_recorded_with_a_cache(self, small_llama: Builder) -> None:
        model = small_llama()
        cache = model.make_cache(1)
        logits = model.hidden_states(model.embed(torch.arange(3)[None]), cache=cache)
        assert not logits.requires_grad
        assert not cache.keys[0].requires_grad


@pytest.mark.gpu
class TestCUDA:
    """The whole model in bf16 on a GPU with each backend, against float32 on the CPU with the same weights."""

    @pytest.mark.parametrize("num_kv_heads", [2, 4])
    @pytest.mark.parametrize("name", ["auto", "xformers", "sdpa", "eager"])
    def test_every_way_through_the_model_is_close_to_fp32(
        self, small_llama: Builder, name: str, num_kv_heads: int
    ) -> None:
        half = small_llama(attention=name, num_kv_heads=num_kv_heads).requires_grad_(False).to("cuda", torch.bfloat16)
        exact = small_llama(num_kv_heads=num_kv_heads).requires_grad_(False)
        exact.load_state_dict(half.state_dict())
        embeds = embeds_of(3, 12, 0).to(torch.bfloat16)
        expected = exact(embeds.float())
        tolerance = BF16_RELATIVE_TOLERANCE * float(expected.std())

        def near(got: Tensor, want: Tensor) -> None:
            torch.testing.assert_close(got.float().cpu(), want, atol=tolerance, rtol=0)

        on_gpu = embeds.cuda()
        near(half(on_gpu), expected)
        packed = exact(embeds.float().view(1, 36, 32), seq_lens=[3, 20, 13])
        near(half(on_gpu.view(1, 36, 32), seq_lens=[3, 20, 13]), packed)
        cache = half.make_cache(3, 12)
        lengths = torch.tensor([7, 1, 4])
        got = half(on_gpu[:, :7], cache=cache, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            near(got[row, :length], expected[row, :length])
        for _ in range(5):
            ragged = cache.lengths.clone()
            got = half(on_gpu[torch.arange(3), ragged][:, None], cache=cache)
            near(got[:, 0], expected[torch.arange(3), ragged.cpu()])
        with pytest.raises(ShapeError, match="row 0 holds 12 tokens and 1 more make 13"):
            half(on_gpu[:, :1], cache=cache)
        got = half(on_gpu[:, 6:12], cache=cache, lengths=[0, 6, 0])
        near(got[1], expected[1, 6:12])

    def test_xformers_and_sdpa_have_the_same_gradients(self, small_llama: Builder) -> None:
        grads = []
        for name in ("sdpa", "xformers"):
            model = small_llama(attention=name).to("cuda", torch.bfloat16)
            model(embeds_of(1, 12, 0).to("cuda", torch.bfloat16), seq_lens=[5, 7]).float().square().mean().backward()
            grads.append([parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None])
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, atol=BF16_RELATIVE_TOLERANCE * float(one.std()) * 4, rtol=0)
