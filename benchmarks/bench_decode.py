"""Decoding: greedy tokens per second after a short prompt, against the memory's limit and transformers' caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_twins
from benchmarks.harness import Case, Context, Sample, Work, nbytes
from sphinxkit.acceleration import FusedAccelerator, quantize

Steps = Callable[[], Callable[[Tensor], Tensor]]
REFERENCE = "sphinxkit, plain modules"
# The logits of the first decoded step are compared; bf16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [
            ("llama2_13b", torch.bfloat16, [1, 8, 32], 64, 64),
            ("llama2_13b", torch.bfloat16, [1], 1519, 64),
            ("tinyllama_1b", torch.bfloat16, [1, 32], 64, 64),
        ],
        [("llama_220m", torch.bfloat16, [1, 8, 16], 64, 64), ("llama_220m", torch.float32, [1, 8], 64, 64)],
        [("micro", torch.bfloat16, [1, 2], 4, 4), ("micro", torch.float32, [1], 4, 4)],
    )
    for size, dtype, batches, prompt, new in runs:
        model, plain = llama_twins.accelerated_and_plain(llama_twins.build(size, context, dtype))
        twin = None
        try:
            twin = llama_twins.transformers_twin(plain)
        except ImportError:
            yield Case(f"{size}: transformers", skip="transformers is not installed")
        for batch in batches:
            yield _case(context, size, model, plain, twin, batch, prompt, new)
        if dtype == torch.bfloat16:
            for bits in (8, 4):
                yield _quantised(context, size, model, bits, prompt, new)
        del model, plain, twin


def _case(context: Context, size: str, model: Any, rival: Any, twin: Any, batch: int, prompt: int, new: int) -> Case:
    dtype = model.norm.weight.dtype
    plain = llama_twins.plain_twin(rival)
    steps: dict[str, Steps] = {
        "sphinxkit": lambda: _ours(model, batch, prompt, new),
        REFERENCE: lambda: _ours(plain, batch, prompt, new),
    }
    if context.device.type == "cpu":
        operators = llama_twins.accelerated(rival, use_gemv=False)
        steps["sphinxkit, torch's operators"] = lambda: _ours(operators, batch, prompt, new)
    if context.micro or (context.device.type == "cuda" and size in llama_twins.COMPILED):
        compiled = llama_twins.compiled(rival, context)
        steps["sphinxkit, compiled"] = lambda: _ours(compiled, batch, prompt, new)
    steps["eager loop, as the public code"] = lambda: _public(rival, batch, prompt, new)
    if twin is not None:
        steps["transformers, dynamic cache"] = lambda: _transformers(twin, batch, prompt, new, static=False)
        steps["transformers, static cache"] = lambda: _transformers(twin, batch, prompt, new, static=True)
    facts: dict[str, dict[str, float]] = {}
    if batch == 1 and dtype == torch.bfloat16:
        steps_beside = {**steps, "sphinxkit, 16-bit cache": lambda: _ours(model, batch, prompt, new, dtype=dtype)}
        facts = _differences(context, steps_beside, REFERENCE, model.vocab_size, prompt, new)
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize * batch
    seen = sum(range(prompt + 1, prompt + new + 1))
    flops = batch * 2 * (llama_twins.num_weights(model) + model.lm_head.weight.numel()) * new
    flops += batch * llama_twins.attention_flops(model, 1) * seen
    return Case(
        f"{size}, batch {batch}, {prompt} + {new} tokens, {str(dtype).removeprefix('torch.')}",
        {name: _timed(context, make, new, facts.get(name)) for name, make in steps.items()},
        Work(flops, llama_twins.weight_bytes(model) * new + kv * seen, kv * new, dtype=dtype),
        [(torch.randint(3, model.vocab_size, (batch, prompt), device=context.device),) for _ in range(3)],
        amount=batch * new,
        unit="tokens",
        tolerance=TOLERANCE[dtype],
        repeats=context.on(None, 5, None),
        note=_sentence(facts),
    )


def _differences(
    context: Context, steps: Mapping[str, Steps], reference: str, vocab_size: int, prompt: int, new: int
) -> dict[str, dict[str, float]]:
    """Greedy text of each candidate beside one that goes through the modules, which decides what the next token is.

    All read the reference's tokens, so a candidate is compared at every position, not only before its first difference.
    """
    ids = torch.randint(3, vocab_size, (1, prompt), device=context.device)
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        line, logits = ids, []
        step = steps[reference]()
        for _ in range(new):
            logits.append(step(line)[0, -1].float())
            line = logits[-1].argmax().view(1, 1)
        for name, make in steps.items():
            step, line, facts = make(), ids, {"tokens that differ": 0.0}
            for position, expected in enumerate(logits):
                token = int(step(line)[0, -1].argmax())
                best = int(expected.argmax())
                if token != best:
                    facts["tokens that differ"] += 1
                    facts.setdefault("first differing token", float(position))
                    facts.setdefault("its logit margin", float(expected[best] - expected[token]))
                line = torch.tensor([[best]], device=ids.device)
            if name != reference:
                found[name] = facts
    spread = float(torch.stack(logits).std())
    return {name: {**facts, "deviation of all logits": spread} for name, facts in found.items()}


def _sentence(facts: Mapping[str, Mapping[str, float]]) -> str:
    """The differences for the reader of the table."""
    told = []
    for name, fact in facts.items():
        if "first differing token" in fact:
            told.append(
                f"{name}: token {fact['first differing token']:.0f} is the first, by a logit margin of "
                f"{fact['its logit margin']:.2g}, {fact['tokens that differ']:.0f} in all"
            )
        else:
            told.append(f"{name}: none")
    if not told:
        return ""
    spread = next(iter(facts.values()))["deviation of all logits"]
    return (
        f"greedy tokens that differ from those of '{REFERENCE}' (logits have a standard deviation of {spread:.2g}): "
        + "; ".join(told)
    )


def _quantised(context: Context, size: str, model: Any, bits: int, prompt: int, new: int) -> Case:
    """Fewer bits beside bf16, with the difference that they make to the logits after a prompt."""
    quantised = llama_twins.plain_twin(model)  # shares what is not quantised
    quantize(quantised, bits, group_size=context.pick(64, 32))
    quantised.accelerator = FusedAccelerator()
    ids = torch.randint(3, model.vocab_size, (1, prompt), device=context.device)
    with torch.no_grad():
        caches = [each.make_cache(1, prompt) for each in (model, quantised)]
        expected, got = (
            each.prefill(each.embed(ids), cache, all_positions=True).float()
            for each, cache in zip((model, quantised), caches, strict=True)
        )
    facts = {
        "relative difference of logits": float((got - expected).norm() / expected.norm()),
        "same next token": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    seen = sum(range(prompt + 1, prompt + new + 1))
    flops = 2 * (llama_twins.num_weights(model) + model.lm_head.weight.numel()) * new
    flops += llama_twins.attention_flops(model, 1) * seen
    weights = nbytes(quantised) - nbytes(quantised.embed_tokens)
    candidates = {
        "sphinxkit": _timed(context, lambda: _ours(quantised, 1, prompt, new), new, facts),
        "sphinxkit, bfloat16": _timed(context, lambda: _ours(model, 1, prompt, new), new),
    }
    if context.device.type == "cpu" and bits == 8:
        operators = llama_twins.plain_twin(model)
        quantize(operators, bits)
        operators.accelerator = FusedAccelerator(use_gemv=False)
        candidates["sphinxkit, torch's operators"] = _timed(context, lambda: _ours(operators, 1, prompt, new), new)
    return Case(
        f"{size}, batch 1, {prompt} + {new} tokens, {bits} bits",
        candidates,
        Work(flops, weights * new + kv * seen, kv * new, dtype=torch.bfloat16),
        [(ids,)],
        amount=new,
        unit="tokens",
        repeats=context.on(None, 5, None),
    )


def _timed(
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


def _ours(
    model: Any, batch: int, prompt: int, new: int, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    cache = model.make_cache(batch, prompt + new, dtype=dtype)

    def step(tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 1:
            return model.decode(tokens, cache)
        cache.reset()
        return model.prefill(model.embed(tokens), cache)

    return step


def _public(model: Any, batch: int, prompt: int, new: int) -> Callable[[Tensor], Tensor]:
    forward = llama_twins.public_loop(model, batch, prompt + new)
    position = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal position
        start = 0 if tokens.shape[1] > 1 else position
        position = start + tokens.shape[1]
        return forward(tokens, start)

    return step


def _transformers(twin: Any, batch: int, prompt: int, new: int, static: bool) -> Callable[[Tensor], Tensor]:
    from transformers import DynamicCache, StaticCache

    cache: Any = StaticCache(config=twin.config, max_cache_len=prompt + new) if static else None
    position = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal cache, position
        if tokens.shape[1] > 1:
            position = 0
            if static:
                cache.reset()
            else:
                cache = DynamicCache(config=twin.config)
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
        position += tokens.shape[1]
        given = llama_twins.cache_argument(twin, cache)
        return twin(input_ids=tokens, position_ids=positions, use_cache=True, logits_to_keep=1, **given).logits

    return step
