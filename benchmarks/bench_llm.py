"""The language model alone: decoding, prefill, ragged batches, and products with fewer bits.

Case names begin with "decode", "prefill", "batch" or "product"; ``--only "^decode"`` runs one kind.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import greedy, llama_twins, released_layout
from benchmarks.harness import Case, Context, Sample, Work, nbytes
from benchmarks.llama_twins import (
    Step,
    accelerated_and_plain,
    attention_flops,
    cache_argument,
    generate_padded,
    num_weights,
    our_step,
    public_step,
    transformers_step,
    transformers_twin,
    weight_bytes,
)
from sphinxkit.acceleration import FusedAccelerator, QuantizedLinear, quantize
from sphinxkit.acceleration.cpu import find_gemv
from sphinxkit.batch_inference import Request, answer_requests
from sphinxkit.generation import Sampling
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tokenizer import Tokenizer

QUICK = True
Steps = Callable[[], Step]
# Twelve to forty layers in another order of summation; bf16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# (rows, columns): the joint projections of the 220 M model.
PRODUCTS = {"qkv": (3072, 1024), "gate and up": (5632, 1024), "down": (1024, 2816)}
QUICK_PRODUCTS = {"gate and up": PRODUCTS["gate and up"]}
MICRO_PRODUCTS = {"qkv": (64, 128)}
GROUP_SIZE = 64


def cases(context: Context) -> Iterator[Case]:
    yield from _decode_cases(context)
    yield from _prefill_cases(context)
    yield from _batch_cases(context)
    if context.device.type == "cpu":  # on CUDA torchao multiplies, which decoding measures
        yield from _product_cases(context)


def _wants_compiled(context: Context, size: str, dtype: torch.dtype) -> bool:
    """Where torch.compile may gain; a micro run traces it in one dtype, as tracing takes seconds."""
    return dtype == torch.float32 if context.micro else context.device.type == "cuda" and size in llama_twins.COMPILED


# -- decoding ---


def _decode_cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [
            ("llama2_13b", torch.bfloat16, [1, 8, 32], 64, 64),
            ("llama2_13b", torch.bfloat16, [1], 1519, 64),
            ("tinyllama_1b", torch.bfloat16, [1, 32], 64, 64),
        ],
        [("llama_220m", torch.bfloat16, [1, 8, 16], 64, 64), ("llama_220m", torch.float32, [1, 8], 64, 64)],
        [("micro", torch.bfloat16, [1, 2], 4, 4), ("micro", torch.float32, [1], 2, 2)],
        [("llama_84m", torch.bfloat16, [1], 8, 8)],
    )
    for size, dtype, batches, prompt, new in runs:
        model, plain = accelerated_and_plain(llama_twins.build(size, context, dtype))
        twin = None
        try:
            twin = transformers_twin(plain)
        except ImportError:
            yield Case(f"decode: {size}, transformers", skip="transformers is not installed")
        for batch in batches:
            yield _decode_case(context, size, model, plain, twin, batch, prompt, new)
        if dtype == torch.bfloat16 and not context.quick:
            for bits in (8, 4):
                yield _quantized_case(context, size, model, bits, prompt, new)
        del model, plain, twin


def _decode_case(
    context: Context, size: str, model: Any, rival: Any, twin: Any, batch: int, prompt: int, new: int
) -> Case:
    dtype = model.norm.weight.dtype
    plain = llama_twins.plain_twin(rival)
    steps: dict[str, Steps] = {
        "sphinxkit": lambda: our_step(model, batch, prompt, new),
        greedy.REFERENCE: lambda: our_step(plain, batch, prompt, new),
    }
    if context.device.type == "cpu":
        operators = llama_twins.accelerated(rival, use_gemv=False)
        steps["sphinxkit, torch's operators"] = lambda: our_step(operators, batch, prompt, new)
    if _wants_compiled(context, size, dtype):
        compiled = llama_twins.compiled(rival, context)
        steps["sphinxkit, compiled"] = lambda: our_step(compiled, batch, prompt, new)
    steps["eager loop, as the public code"] = lambda: public_step(rival, batch, prompt, new)
    if twin is not None:
        steps["transformers, dynamic cache"] = lambda: transformers_step(twin, batch, prompt, new, static=False)
        steps["transformers, static cache"] = lambda: transformers_step(twin, batch, prompt, new, static=True)
    facts: dict[str, dict[str, float]] = {}
    if batch == 1 and dtype == torch.bfloat16 and not context.quick:
        steps_beside = {
            **steps,
            "sphinxkit, 16-bit cache": lambda: our_step(model, batch, prompt, new, dtype=dtype),
        }
        facts = greedy.differences(context, steps_beside, greedy.REFERENCE, model.vocab_size, prompt, new)
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize * batch
    seen = sum(range(prompt + 1, prompt + new + 1))
    flops = batch * 2 * (num_weights(model) + model.lm_head.weight.numel()) * new
    flops += batch * attention_flops(model, 1) * seen
    return Case(
        f"decode: {size}, batch {batch}, {prompt} + {new} tokens, {str(dtype).removeprefix('torch.')}",
        {name: _timed_steps(context, make, new, facts.get(name)) for name, make in steps.items()},
        Work(flops, weight_bytes(model) * new + kv * seen, kv * new, dtype=dtype),
        [(torch.randint(3, model.vocab_size, (batch, prompt), device=context.device),) for _ in range(3)],
        amount=batch * new,
        unit="tokens",
        tolerance=TOLERANCE[dtype],
        repeats=context.on(None, 5, None, 3),
        note=greedy.sentence(facts),
    )


def _quantized_case(context: Context, size: str, model: Any, bits: int, prompt: int, new: int) -> Case:
    """Fewer bits beside bf16, with the difference that they make to the logits after a prompt."""
    quantized = llama_twins.plain_twin(model)  # shares what is not quantized
    quantize(quantized, bits, group_size=context.pick(64, 32))
    quantized.accelerator = FusedAccelerator()
    ids = torch.randint(3, model.vocab_size, (1, prompt), device=context.device)
    with torch.no_grad():
        caches = [each.make_cache(1, prompt) for each in (model, quantized)]
        expected, got = (
            each.prefill(each.embed(ids), cache, all_positions=True).float()
            for each, cache in zip((model, quantized), caches, strict=True)
        )
    facts = {
        "relative difference of logits": float((got - expected).norm() / expected.norm()),
        "same next token": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    seen = sum(range(prompt + 1, prompt + new + 1))
    flops = 2 * (num_weights(model) + model.lm_head.weight.numel()) * new
    flops += attention_flops(model, 1) * seen
    weights = nbytes(quantized) - nbytes(quantized.embed_tokens)
    candidates = {
        "sphinxkit": _timed_steps(context, lambda: our_step(quantized, 1, prompt, new), new, facts),
        "sphinxkit, bfloat16": _timed_steps(context, lambda: our_step(model, 1, prompt, new), new),
    }
    if context.device.type == "cpu" and bits == 8:
        operators = llama_twins.plain_twin(model)
        quantize(operators, bits)
        operators.accelerator = FusedAccelerator(use_gemv=False)
        candidates["sphinxkit, torch's operators"] = _timed_steps(
            context, lambda: our_step(operators, 1, prompt, new), new
        )
    return Case(
        f"decode: {size}, batch 1, {prompt} + {new} tokens, {bits} bits",
        candidates,
        Work(flops, weights * new + kv * seen, kv * new, dtype=torch.bfloat16),
        [(ids,)],
        amount=new,
        unit="tokens",
        repeats=context.on(None, 5, None, 3),
    )


def _timed_steps(
    context: Context, make: Callable[[], Callable[[Tensor], Tensor]], new: int, extra: Mapping[str, float] | None = None
) -> Callable[[Tensor], Sample]:
    """Prefill outside the clock, then ``new`` greedy steps inside it."""
    step = make()

    def call(prompt: Tensor) -> Sample:
        step(prompt)
        tokens = prompt[:, :1]  # given, as in 16 bit a near tie would have the candidates read different tokens
        first = None
        with context.timer() as timer:
            for _ in range(new):
                logits = step(tokens)
                first = logits if first is None else first
                tokens = logits[:, -1:].argmax(-1)
        return Sample(timer.seconds, output=first, cpu_seconds=timer.cpu_seconds, extra=dict(extra or {}))

    return call


# -- ragged batches ---


@dataclass(frozen=True)
class Rows:
    """What is asked; both lengths are drawn log-uniformly, our choice: many short answers, a few long ones.

    Args:
        count: Rows.
        batch: How many are decoded together.
        prompt: Fewest and most words of a question.
        answer: Fewest and most tokens of an answer.
    """

    count: int
    batch: int
    prompt: tuple[int, int]
    answer: tuple[int, int]


def _batch_cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [
            ("llama2_13b", torch.bfloat16, Rows(64, 32, (16, 256), (8, 128))),
            ("tinyllama_1b", torch.bfloat16, Rows(64, 32, (16, 256), (8, 128))),
        ],
        [("llama_220m", torch.bfloat16, Rows(24, 8, (8, 64), (8, 96)))],
        [("micro", torch.float32, Rows(6, 2, (1, 3), (2, 5))), ("micro", torch.bfloat16, Rows(5, 2, (1, 3), (2, 5)))],
        [("llama_84m", torch.bfloat16, Rows(6, 3, (4, 16), (4, 8)))],
    )
    for size, dtype, rows in runs:
        small = (released_layout.GOLDEN / "llama_ens_light" / "tokenizer.model").read_bytes()
        num_pieces = Tokenizer(small).vocab_size
        vocab_size = num_pieces if context.micro else 32000
        tokenizer = Tokenizer(released_layout.pad_tokenizer(small, num_pieces, vocab_size))
        llm = llama_twins.build(size, context, dtype, vocab_size=vocab_size)
        with torch.no_grad():
            llm.lm_head.weight[tokenizer.eos_id] = 0  # never chosen: every row has its full length
        llm.accelerator = FusedAccelerator()
        yield _batch_case(context, size, SphinxModel(llm, tokenizer=tokenizer), rows)
        del llm


def _batch_case(context: Context, size: str, model: SphinxModel, rows: Rows) -> Case:
    tokenizer, llm, dtype = model.require_tokenizer(), model.llm, model.dtype
    requests = _requests(rows)
    prompts = [tokenizer.encode(request.prompt, bos=True) for request in requests]
    answer_lengths = [request.sampling.max_new_tokens for request in requests]
    total = sum(answer_lengths)
    runs: dict[str, Callable[[], list[Tensor]]] = {
        "sphinxkit": lambda: _continuous(model, requests, rows.batch),
        "sphinxkit, batches one after another": lambda: _in_batches(model, requests, rows.batch),
    }
    note = ""
    if context.device.type == "cuda":
        note = "one row after another, and prompts sorted by length, were left out for time"
    else:
        runs["sphinxkit, one row after another"] = lambda: _continuous(model, requests, 1)
    try:
        twin = transformers_twin(llm)
    except ImportError:
        note = "transformers is not installed"
    else:
        in_order = list(range(rows.count))
        by_length = sorted(in_order, key=lambda row: len(prompts[row]))
        pad = tokenizer.eos_id
        runs["transformers, padded batches"] = lambda: generate_padded(
            twin, prompts, answer_lengths, in_order, rows.batch, pad
        )
        if context.device.type != "cuda":
            runs["transformers, prompts sorted"] = lambda: generate_padded(
                twin, prompts, answer_lengths, by_length, rows.batch, pad
            )
    return Case(
        f"batch: {size}, {rows.count} rows, batch {rows.batch}, prompts of {min(map(len, prompts))} to "
        f"{max(map(len, prompts))} tokens, answers of {min(answer_lengths)} to {max(answer_lengths)}, "
        f"{str(dtype).removeprefix('torch.')}",
        {name: _timed_batch(context, run, answer_lengths) for name, run in runs.items()},
        _batch_work(llm, prompts, answer_lengths, rows.batch, dtype),
        amount=total,
        unit="tokens",
        # the same greedy tokens in float32; in 16 bit the ways part where two tokens are nearly as likely
        tolerance=0 if dtype == torch.float32 else None,
        repeats=context.on(3, 3, None),
        max_seconds=context.on(30, 120, 60),
        note=note,
    )


def _requests(rows: Rows) -> list[Request]:
    draw = random.Random(0)

    def log_uniform(bounds: tuple[int, int]) -> int:
        low, high = bounds
        return min(high, int(low * ((high + 1) / low) ** draw.random()))

    words = ["what", "is", "in", "the", "image", "left", "of", "a", "red", "cube", "count", "two", "small", "circles"]
    made = []
    for index in range(rows.count):
        question = " ".join(draw.choice(words) for _ in range(log_uniform(rows.prompt)))
        made.append(Request(index, question, None, Sampling(max_new_tokens=log_uniform(rows.answer))))
    return made


def _timed_batch(
    context: Context, run: Callable[[], list[Tensor]], answer_lengths: Sequence[int]
) -> Callable[[], Sample]:
    def call() -> Sample:
        with context.timer() as timer:
            answers = run()
        if [len(answer) for answer in answers] != list(answer_lengths):
            raise RuntimeError("an answer has another length than asked for")
        extra = {"rows/s": len(answers) / timer.seconds}
        return Sample(timer.seconds, None, answers, extra, timer.cpu_seconds)

    return call


def _continuous(model: SphinxModel, requests: Sequence[Request], batch: int) -> list[Tensor]:
    """A finished row's place is taken by the next."""
    answers: dict[int, Tensor] = {}
    for answered in answer_requests(model, requests, batch_size=batch):
        if answered.generation is None:
            raise RuntimeError(f"row {answered.request.index}: {answered.error}")
        answers[answered.request.index] = torch.tensor(answered.generation.token_ids)
    return [answers[index] for index in range(len(requests))]


def _in_batches(model: SphinxModel, requests: Sequence[Request], batch: int) -> list[Tensor]:
    """Rows leave a batch as they finish; the next batch begins when all have."""
    parts = [requests[start : start + batch] for start in range(0, len(requests), batch)]
    moved = [[Request(index, each.prompt, None, each.sampling) for index, each in enumerate(part)] for part in parts]
    return [answer for part in moved for answer in _continuous(model, part, batch)]


def _batch_work(
    llm: Any, prompts: Sequence[list[int]], answer_lengths: Sequence[int], batch: int, dtype: torch.dtype
) -> Work:
    """Arithmetic of every token; the weights once for each pass of a batch that is always full."""
    flops = 0.0
    kv = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * dtype.itemsize
    read = written = 0.0
    for prompt, new in zip(prompts, answer_lengths, strict=True):
        tokens = len(prompt) + new - 1
        flops += 2 * (num_weights(llm) * tokens + llm.lm_head.weight.numel() * new)
        flops += attention_flops(llm, tokens)
        read += kv * sum(range(len(prompt), tokens))
        written += kv * tokens
    passes = max(max(answer_lengths), -(-sum(answer_lengths) // batch))
    return Work(flops, read + weight_bytes(llm) * passes, written, dtype=dtype)


# -- prefill ---


def _prefill_cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [("llama2_13b", torch.bfloat16, 1455), ("tinyllama_1b", torch.bfloat16, 1295)],
        [("llama_220m", torch.bfloat16, 1455), ("llama_220m", torch.float32, 1455)],
        [("micro", torch.bfloat16, 12), ("micro", torch.float32, 12)],
        [("llama_84m", torch.bfloat16, 192)],
    )
    for size, dtype, tokens in runs:
        yield from _prefill_sizes(context, size, dtype, tokens + context.pick(64, 4))


def _prefill_sizes(context: Context, size: str, dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    model, plain = accelerated_and_plain(llama_twins.build(size, context, dtype))
    for batch in context.on([1, 8], [1], [2]):
        cache = model.make_cache(batch, tokens + 8)
        candidates: dict[str, Any] = {"sphinxkit": functools.partial(_prefill, model, cache)}
        if _wants_compiled(context, size, dtype):
            candidates["sphinxkit, compiled"] = functools.partial(_prefill, llama_twins.compiled(plain, context), cache)
        try:
            candidates |= _transformers_prefill(plain)
        except ImportError:
            yield Case("prefill: transformers", skip="transformers is not installed")
        head = model.lm_head.weight.numel()
        flops = 2 * batch * (num_weights(model) * tokens + head)
        flops += batch * attention_flops(model, tokens)
        inputs = [(context.randn(batch, tokens, model.embed_dim, dtype=dtype),) for _ in range(2)]
        yield Case(
            f"prefill: {size}, {batch} x {tokens} tokens, {str(dtype).removeprefix('torch.')}",
            candidates,
            Work(flops, weight_bytes(model) + nbytes(*inputs[0]), cache.num_bytes, dtype=dtype),
            inputs,
            amount=batch * tokens,
            unit="tokens",
            tolerance=TOLERANCE[dtype],
            repeats=context.on(None, 5, None, 3),
        )
        del cache, candidates


def _prefill(model: Any, cache: Any, embeds: Tensor) -> Tensor:
    cache.reset()
    return model.prefill(embeds, cache)


def _transformers_prefill(model: Any) -> dict[str, Any]:
    from transformers import DynamicCache

    twin = transformers_twin(model)

    def call(embeds: Tensor) -> Tensor:
        cache = DynamicCache(config=twin.config)
        given = cache_argument(twin, cache)
        return twin(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **given).logits

    return {"transformers": call}


# -- products alone: one token and a few against 8- and 4-bit weights, beside 16 bit ---


def _product_cases(context: Context) -> Iterator[Case]:
    shapes = context.pick(PRODUCTS, MICRO_PRODUCTS, QUICK_PRODUCTS)
    for name, (outputs, width) in shapes.items():
        # enough copies that no cache holds them
        weights = [
            context.randn(outputs, width, dtype=torch.bfloat16) for _ in range(context.num_input_sets(outputs * width))
        ]
        plain: list[Callable[[Tensor], Tensor]] = [lambda x, weight=weight: F.linear(x, weight) for weight in weights]
        for bits in (8, 4):
            layers = [QuantizedLinear(weight, bits, GROUP_SIZE) for weight in weights]
            coded = find_gemv(torch.bfloat16, coded=True) if bits == 8 else None
            for rows in context.pick([1, 8], [1, 3]):
                x = context.randn(rows, width, dtype=torch.bfloat16)
                candidates = {"sphinxkit": _all(layers, x), "bfloat16": _all(plain, x)}
                if coded is not None:  # as fused layers multiply
                    ours = [functools.partial(coded, weight=layer.codes, scales=layer.scales) for layer in layers]
                    candidates = {**candidates, "sphinxkit": _all(ours, x), "torch's kernel": candidates["sphinxkit"]}
                count = len(weights)
                work = Work(
                    2 * count * rows * outputs * width,
                    count * (nbytes(layers[0]) + nbytes(x)),
                    count * rows * outputs * 2,
                    dtype=torch.bfloat16,
                )
                yield Case(
                    f"product: {name}, {width} to {outputs}, {rows} rows, {bits} bits, {count} products",
                    candidates,
                    work,
                    amount=count * rows,
                    unit="rows",
                )


def _all(functions: Sequence[Any], x: Tensor) -> Callable[[], Tensor]:
    """One product after the other."""

    def run() -> Tensor:
        for function in functions:
            out: Tensor = function(x)
        return out

    return run
