from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit.acceleration import CompiledAccelerator, FusedAccelerator, accelerate, compiled
from sphinxkit.acceleration.compiled import MIN_BUCKET, bucket, compiler_fault
from sphinxkit.errors import DataError, RegistryError, ShapeError
from sphinxkit.llama import KVCache, LlamaModel

# float32 sums in another order and rotates without complex numbers: 1e-6 of logits of about 3, over two layers
LOGITS_TOLERANCE = 1e-5
TRACED = "eager"  # torch.compile traces and guards as ever and runs the operators: no code is made, which takes long

Builder = Callable[..., LlamaModel]


@pytest.fixture(autouse=True)
def own_compiler_state() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model(ready_llama: Builder) -> LlamaModel:
    return ready_llama(max_seq_len=300)


def prompts(lengths: list[int]) -> Tensor:
    return torch.randint(0, 61, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))


def answer(model: LlamaModel, cache: KVCache, lengths: list[int], steps: int = 3) -> Tensor:
    """Logits after a prompt and of some steps behind it."""
    found = [model.prefill(model.embed(prompts(lengths)), cache, lengths)]
    for step in range(steps):
        tokens = (torch.arange(len(lengths))[:, None] * 7 + step * 5) % 61
        found.append(model.decode(tokens, cache))
    return torch.cat(found, dim=1)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE, rtol=0)


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_a_bucket_holds_the_length_and_little_more(length: int, more: int) -> None:
    limit = length + more
    found = bucket(length, limit)
    assert length <= found <= limit
    assert found <= max(MIN_BUCKET, 3 * length / 2)
    assert bucket(found, limit) == found


def test_buckets_by_hand() -> None:
    assert [bucket(length, 4096) for length in (1, 64, 65, 97, 128, 129, 193, 1455, 1519, 2049)] == [
        *(64, 64, 96, 128, 128, 192, 256, 1536, 1536, 3072)
    ]
    assert bucket(1300, 1400) == 1400
    assert len({bucket(length, 4096) for length in range(1, 4097)}) == 13


@pytest.mark.parametrize(
    ("attention", "is_joined", "static"),
    [("auto", True, False), ("auto", False, True), pytest.param("eager", True, True, marks=pytest.mark.slow)],
)
def test_logits_are_those_of_the_plain_model(
    ready_llama: Builder, module_calls: list[int], attention: str, is_joined: bool, static: bool
) -> None:
    model = ready_llama(max_seq_len=300, attention=attention)
    # a tensor beside a weight keeps it from being joined, so the modules are traced
    beside = None if is_joined else model.layers[0].attention.q_proj.weight.data
    lengths = [30, 7, 1]

    def cache() -> KVCache:
        return KVCache(2, 3, 100, 2, 8, static_shapes=static)

    def twice(cache: KVCache) -> Tensor:
        """A prompt, and a second one behind it and its answer, ragged both times."""
        return torch.cat([answer(model, cache, lengths, 1), answer(model, cache, [3, 20, 9], 1)], dim=1)

    expected, plain = twice(cache()), cache()
    twice(plain)
    module_calls.clear()
    model.accelerator = CompiledAccelerator(TRACED)
    kept = cache()
    close(twice(kept), expected)
    assert model.accelerator.num_graphs == 3
    assert bool(module_calls) == (beside is not None)
    assert kept.lengths.tolist() == plain.lengths.tolist() == [35, 29, 12]
    for row, length in enumerate(kept.lengths.tolist()):
        for got, wanted in zip((*kept.keys, *kept.values), (*plain.keys, *plain.values), strict=True):
            close(got[row, :, :length], wanted[row, :, :length])
    model.accelerator = None
    close(twice(cache()), expected)


@pytest.mark.slow
def test_lengths_of_a_bucket_share_their_graphs(model: LlamaModel) -> None:
    lengths = [5, 33, 40, 1, 64]
    expected = [answer(model, model.make_cache(1, length + 10), [length]) for length in lengths]
    model.accelerator = steps = CompiledAccelerator(TRACED)
    for length in (5, 60):  # reading, and decoding over 64 and 96 slots
        answer(model, model.make_cache(1, length + 10), [length])
    assert steps.num_graphs == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for length, logits in zip(lengths, expected, strict=True):
            close(answer(model, model.make_cache(1, length + 10), [length]), logits)
        again = model.make_cache(1, 50)
        answer(model, again, [40])
        again.reset()
        answer(model, again, [20])
        assert steps.num_graphs == 3
        with pytest.raises(RuntimeError, match="Detected recompile"):  # the next bucket: the counter works
            answer(model, model.make_cache(1, 90), [65])


@pytest.mark.slow
def test_more_graphs_than_the_compiler_allows_variants(ready_llama: Builder) -> None:
    model = ready_llama(CompiledAccelerator(TRACED), num_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2, 3):
            model.decode(torch.zeros(rows, 1, dtype=torch.int64), KVCache(1, rows, 20, 2, 8))


@pytest.mark.slow
def test_padding_does_not_overflow_a_small_cache(model: LlamaModel) -> None:
    """20 slots; the bucket has 64 columns. A row may be full to its end."""

    def cache() -> KVCache:
        return KVCache(2, 2, 20, 2, 8, static_shapes=True)

    expected = answer(model, cache(), [17, 4])
    plain = cache()
    model.prefill(model.embed(prompts([9, 3])), plain, [9, 3])
    behind = answer(model, plain, [11, 5], 0)
    model.accelerator = CompiledAccelerator(TRACED)
    full = cache()
    close(answer(model, full, [17, 4]), expected)
    with pytest.raises(ShapeError, match="row 0 holds 20 tokens and 1 more make 21, but its capacity is 20"):
        model.decode(torch.zeros(2, 1, dtype=torch.int64), full)
    assert full.lengths.tolist() == [20, 7]
    kept = cache()
    model.prefill(model.embed(prompts([9, 3])), kept, [9, 3])
    close(answer(model, kept, [11, 5], 0), behind)
    with pytest.raises(ShapeError, match="its capacity is 20"):
        model.prefill(model.embed(prompts([2, 2])), kept, [2, 2])
    assert kept.lengths.tolist() == [20, 8]


def test_a_prompt_as_long_as_the_model_allows(model: LlamaModel) -> None:
    expected = answer(model, model.make_cache(1, 300), [299], 1)
    model.accelerator = CompiledAccelerator(TRACED)
    cache = model.make_cache(1, 299)
    assert cache.max_seq_len == 300
    close(answer(model, cache, [299], 1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_that_was_made(model: LlamaModel, dtype: torch.dtype) -> None:
    """The whole way through torch's compiler."""
    fault = compiler_fault(torch.device("cpu"))
    if fault is not None:
        pytest.skip(fault)
    model.to(dtype).accelerator = FusedAccelerator()
    expected = answer(model, model.make_cache(2, 50), [9, 30])
    accelerate(model, "compile")
    got = answer(model, model.make_cache(2, 50), [9, 30])
    # bf16 rounds where the graph does not: a few steps of 2^-8 of logits of about 3
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.slow
def test_moved_weights_are_compiled_anew(model: LlamaModel) -> None:
    model.accelerator = steps = CompiledAccelerator(TRACED)
    answer(model, model.make_cache(1, 50), [9])
    assert steps.num_graphs == 2
    model.to(torch.float64)
    assert steps.num_graphs == 0
    got = answer(model, model.make_cache(1, 50), [9])
    assert steps.num_graphs == 2
    before = model.layers[0].mlp.up_proj
    model.layers[0].mlp.up_proj = copy.deepcopy(before)
    again = answer(model, model.make_cache(1, 50), [9])
    assert steps.num_graphs == 2
    model.accelerator = None
    expected = answer(model, model.make_cache(1, 50), [9])
    close(got, expected)
    close(again, expected)


def test_hooks_and_training_leave_the_graphs_aside(model: LlamaModel, module_calls: list[int]) -> None:
    model.accelerator = CompiledAccelerator(TRACED)
    expected = answer(model, model.make_cache(1, 50), [9])
    assert not module_calls
    seen: list[int] = []
    handle = model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    close(answer(model, model.make_cache(1, 50), [9]), expected)
    assert len(seen) == 4
    handle.remove()
    model.train()
    close(answer(model, model.make_cache(1, 50), [9]), expected)
    assert len(module_calls) == 2 * 2 * 4
    model.eval()
    close(answer(model, model.make_cache(1, 50), [9]), expected)
    assert len(module_calls) == 2 * 2 * 4


def test_drafts_are_read_by_the_fused_layers(model: LlamaModel) -> None:
    embeds = model.embed(prompts([9]))
    expected = model(embeds)
    model.accelerator = steps = CompiledAccelerator(TRACED)
    close(model.prefill(embeds, model.make_cache(1, 50), all_positions=True), expected)
    assert steps.num_graphs == 0
    assert steps.current(model) is not None


@pytest.mark.slow
def test_copies_compile_for_themselves(model: LlamaModel) -> None:
    model.accelerator = CompiledAccelerator(TRACED)
    expected = answer(model, model.make_cache(1, 50), [9])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.accelerator, CompiledAccelerator)
        assert copied.accelerator.num_graphs == 0
        close(answer(copied, copied.make_cache(1, 50), [9]), expected)


def test_only_decoding_on_cuda_is_recorded(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda run, *, mode=None, **options: asked.append(mode))
    for has_cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        steps = CompiledAccelerator()
        for run, *key in (
            (compiled._first_pass, 1, 64),
            (compiled._cached_pass, 1, 64, 72),
            (compiled._cached_pass, 1, 1, 72),
        ):
            steps._graph(run, model.run_layers, *key)
    assert asked == [None, None, "reduce-overhead", None, None, None]


class TestModes:
    def test_by_name(self, model: LlamaModel) -> None:
        accelerate(model)
        assert type(model.accelerator) is FusedAccelerator
        assert model.make_cache(1, 70).max_seq_len == 70
        if compiler_fault(torch.device("cpu")) is None:
            accelerate(model, "compile")
            assert type(model.accelerator) is CompiledAccelerator
            assert model.make_cache(1, 70).max_seq_len == 96  # a bucket's
        accelerate(model, None)
        assert model.accelerator is None
        with pytest.raises(DataError, match="accelerate: expected 'auto', 'compile' or None, got 'fast'"):
            accelerate(model, "fast")  # type: ignore[arg-type]

    def test_another_language_model_has_its_own_ways(self) -> None:
        other = torch.nn.Linear(2, 2)
        accelerate(other, "auto")
        with pytest.raises(DataError, match="expected sphinxkit's LLaMA to compile, got Linear"):
            accelerate(other, "compile")

    def test_without_a_compiler_it_says_so(self, model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import cpp_builder, exc

        def missing() -> str:
            raise exc.InvalidCxxCompiler

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
        with pytest.raises(RegistryError, match=r"compiled steps cannot run on cpu: no C\+\+ compiler was found"):
            accelerate(model, "compile")
        assert model.accelerator is None
        from torch.utils import _triton

        monkeypatch.setattr(_triton, "has_triton", lambda: False)
        assert compiler_fault(torch.device("cuda")) == "Triton is missing, or does not know this device"

    def test_attention_that_cannot_be_traced_is_refused(self, ready_llama: Builder) -> None:
        with pytest.raises(RegistryError, match="trace attention auto, sdpa, eager, but the model asks for 'xformers'"):
            CompiledAccelerator(TRACED).check(ready_llama(attention="xformers"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(model: LlamaModel, dtype: torch.dtype) -> None:
    expected = answer(model, model.make_cache(2, 50), [9, 30])
    accelerate(model.to("cuda", dtype), "compile")
    cache = model.make_cache(2, 50)
    logits = [model.prefill(model.embed(prompts([9, 30]).cuda()), cache, [9, 30])]
    for step in range(3):
        tokens = (torch.arange(2)[:, None] * 7 + step * 5) % 61
        logits.append(model.decode(tokens.cuda(), cache))
    got = torch.cat(logits, dim=1).cpu().float()
    # TF32 is off by default; bf16 has 8 bits of mantissa
    torch.testing.assert_close(got, expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0)
