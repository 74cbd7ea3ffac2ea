from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.llama import KVCache, LlamaModel
from sphinxkit.llama.compiled import MIN_BUCKET, bucket, compiler_fault

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
def model(small_llama: Builder) -> LlamaModel:
    return small_llama(max_seq_len=300).requires_grad_(False)


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
    ("attention", "fused", "static"),
    [("auto", True, False), ("auto", False, True), pytest.param("eager", True, True, marks=pytest.mark.slow)],
)
def test_logits_are_those_of_the_plain_model(small_llama: Builder, attention: str, fused: bool, static: bool) -> None:
    model = small_llama(max_seq_len=300, attention=attention).requires_grad_(False)
    lengths = [30, 7, 1]

    def cache() -> KVCache:
        return KVCache(2, 3, 100, 2, 8, static_shapes=static)

    def twice(cache: KVCache) -> Tensor:
        """A prompt, and a second one behind it and its answer, ragged both times."""
        return torch.cat([answer(model, cache, lengths, 1), answer(model, cache, [3, 20, 9], 1)], dim=1)

    expected, plain = twice(cache()), cache()
    twice(plain)
    if fused:
        model.fuse()
    model.use_compiled_steps(compiler=TRACED)
    kept = cache()
    close(twice(kept), expected)
    assert kept.lengths.tolist() == plain.lengths.tolist() == [35, 29, 12]
    for row, length in enumerate(kept.lengths.tolist()):
        for got, wanted in zip((*kept.keys, *kept.values), (*plain.keys, *plain.values), strict=True):
            close(got[row, :, :length], wanted[row, :, :length])
    model.use_compiled_steps(False)
    close(twice(cache()), expected)


def test_lengths_of_a_bucket_share_their_graphs(model: LlamaModel) -> None:
    lengths = [5, 33, 40, 1, 64]
    expected = [answer(model, model.make_cache(1, length + 10), [length]) for length in lengths]
    model.use_compiled_steps(compiler=TRACED)
    steps = model._compiled
    assert steps is not None
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


def test_more_graphs_than_the_compiler_allows_variants(small_llama: Builder) -> None:
    model = small_llama(num_layers=1).requires_grad_(False)
    model.use_compiled_steps(compiler=TRACED)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2, 3):
            model.decode(torch.zeros(rows, 1, dtype=torch.int64), KVCache(1, rows, 20, 2, 8))


def test_padding_does_not_overflow_a_small_cache(model: LlamaModel) -> None:
    """20 slots; the bucket has 64 columns. A row may be full to its end."""

    def cache() -> KVCache:
        return KVCache(2, 2, 20, 2, 8, static_shapes=True)

    expected = answer(model, cache(), [17, 4])
    plain = cache()
    model.prefill(model.embed(prompts([9, 3])), plain, [9, 3])
    behind = answer(model, plain, [11, 5], 0)
    model.use_compiled_steps(compiler=TRACED)
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
    model.use_compiled_steps(compiler=TRACED)
    cache = model.make_cache(1, 299)
    assert cache.max_seq_len == 300
    close(answer(model, cache, [299], 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_code_that_was_made(model: LlamaModel, dtype: torch.dtype) -> None:
    """The whole way through torch's compiler."""
    fault = compiler_fault(torch.device("cpu"))
    if fault is not None:
        pytest.skip(fault)
    model.to(dtype).fuse()
    expected = answer(model, model.make_cache(2, 50), [9, 30])
    model.use_compiled_steps()
    got = answer(model, model.make_cache(2, 50), [9, 30])
    # bf16 rounds where the graph does not: a few steps of 2^-8 of logits of about 3
    torch.testing.assert_close(got, expected, atol=LOGITS_TOLERANCE if dtype == torch.float32 else 0.1, rtol=0)


def test_moved_weights_are_compiled_anew(model: LlamaModel) -> None:
    model.fuse()
    model.use_compiled_steps(compiler=TRACED)
    answer(model, model.make_cache(1, 50), [9])
    assert model._compiled is not None
    model.to(torch.float64)
    assert model._compiled.num_graphs == 0
    got = answer(model, model.make_cache(1, 50), [9])
    model.use_compiled_steps(False)
    close(got, answer(model, model.make_cache(1, 50), [9]))


def test_without_a_compiler_it_says_so(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(RegistryError, match=r"compiled steps cannot run on cpu: no C\+\+ compiler was found"):
        model.use_compiled_steps()
    assert model._compiled is None
    from torch.utils import _triton

    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    assert compiler_fault(torch.device("cuda")) == "Triton is missing, or does not know this device"


def test_what_cannot_be_traced_is_refused(small_llama: Builder, model: LlamaModel) -> None:
    with pytest.raises(RegistryError, match="can trace attention auto, sdpa, eager, but the model asks for 'xformers'"):
        small_llama(attention="xformers").use_compiled_steps(compiler=TRACED)
    model.bfloat16().fuse(pack=True)
    model.use_compiled_steps(compiler=TRACED)
    with pytest.raises(RegistryError, match="cannot trace packed weights"):
        answer(model, model.make_cache(1, 50), [9])
    with pytest.raises(ShapeError, match=r"expected token ids \(2, 1\), got \(2, 3\)"):
        model.decode(torch.zeros(2, 3, dtype=torch.int64), model.make_cache(2, 50))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(model: LlamaModel, dtype: torch.dtype) -> None:
    expected = answer(model, model.make_cache(2, 50), [9, 30])
    model.to("cuda", dtype).fuse()
    model.use_compiled_steps()
    cache = model.make_cache(2, 50)
    logits = [model.prefill(model.embed(prompts([9, 30]).cuda()), cache, [9, 30])]
    for step in range(3):
        tokens = (torch.arange(2)[:, None] * 7 + step * 5) % 61
        logits.append(model.decode(tokens.cuda(), cache))
    got = torch.cat(logits, dim=1).cpu().float()
    # TF32 is off by default; bf16 has 8 bits of mantissa
    torch.testing.assert_close(got, expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0)
