"""Prefill: the 1455 image tokens of SPHINX-1k and a question into the cache, the last position's logits out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_twins
from benchmarks.harness import Case, Context, Work, nbytes

# Twelve to forty layers in another order of summation; bf16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [("llama2_13b", torch.bfloat16, 1455), ("tinyllama_1b", torch.bfloat16, 1295)],
        [("llama_220m", torch.bfloat16, 1455), ("llama_220m", torch.float32, 1455)],
        [("micro", torch.bfloat16, 12), ("micro", torch.float32, 12)],
    )
    for size, dtype, tokens in runs:
        yield from _cases(context, size, dtype, tokens + context.pick(64, 4))


def _cases(context: Context, size: str, dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    model, plain = llama_twins.accelerated_and_plain(llama_twins.build(size, context, dtype))
    for batch in context.on([1, 8], [1], [1, 2]):
        cache = model.make_cache(batch, tokens + 8)
        candidates: dict[str, Any] = {"sphinxkit": functools.partial(_ours, model, cache)}
        if context.micro or (context.device.type == "cuda" and size in llama_twins.COMPILED):
            candidates["sphinxkit, compiled"] = functools.partial(_ours, llama_twins.compiled(plain, context), cache)
        try:
            candidates |= _transformers(plain, tokens)
        except ImportError:
            yield Case("transformers", skip="transformers is not installed")
        head = model.lm_head.weight.numel()
        flops = 2 * batch * (llama_twins.num_weights(model) * tokens + head)
        flops += batch * llama_twins.attention_flops(model, tokens)
        inputs = [(context.randn(batch, tokens, model.embed_dim, dtype=dtype),) for _ in range(2)]
        yield Case(
            f"{size}, {batch} x {tokens} tokens, {str(dtype).removeprefix('torch.')}",
            candidates,
            Work(flops, llama_twins.weight_bytes(model) + nbytes(*inputs[0]), cache.num_bytes, dtype=dtype),
            inputs,
            amount=batch * tokens,
            unit="tokens",
            tolerance=TOLERANCE[dtype],
            repeats=context.on(None, 5, None),
        )
        del cache, candidates


def _ours(model: Any, cache: Any, embeds: Tensor) -> Tensor:
    cache.reset()
    return model.prefill(embeds, cache)


def _transformers(model: Any, tokens: int) -> dict[str, Any]:
    from transformers import DynamicCache

    twin = llama_twins.transformers_twin(model)

    def call(embeds: Tensor) -> Tensor:
        cache = DynamicCache(config=twin.config)
        given = llama_twins.cache_argument(twin, cache)
        return twin(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **given).logits

    return {"transformers": call}
