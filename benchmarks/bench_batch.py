"""Ragged questions and answers, text alone: continuous batching against padded batches and one row after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_twins, released_layout
from benchmarks.harness import Case, Context, Sample, Work
from sphinxkit.acceleration import FusedAccelerator
from sphinxkit.batch_inference import Request, answer_requests
from sphinxkit.generation import Sampling
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tokenizer import Tokenizer


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


def cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [
            ("llama2_13b", torch.bfloat16, Rows(64, 32, (16, 256), (8, 128))),
            ("tinyllama_1b", torch.bfloat16, Rows(64, 32, (16, 256), (8, 128))),
        ],
        [("llama_220m", torch.bfloat16, Rows(24, 8, (8, 64), (8, 96)))],
        [("micro", torch.float32, Rows(6, 2, (1, 3), (2, 5))), ("micro", torch.bfloat16, Rows(5, 2, (1, 3), (2, 5)))],
    )
    for size, dtype, rows in runs:
        small = (released_layout.GOLDEN / "llama_ens_light" / "tokenizer.model").read_bytes()
        num_pieces = Tokenizer(small).vocab_size
        vocab_size = num_pieces if context.micro else 32000
        tokenizer = Tokenizer(released_layout.pad_tokenizer(small, num_pieces, vocab_size))
        llm = llama_twins.build(size, context, dtype, vocab_size=vocab_size)
        with torch.no_grad():
            llm.lm_head.weight[tokenizer.eos_id] = (
                0  # rows end where they are told to, which no best logit of 0 changes
            )
        llm.accelerator = FusedAccelerator()
        yield _case(context, size, SphinxModel(llm, tokenizer=tokenizer), rows)
        del llm


def _case(context: Context, size: str, model: SphinxModel, rows: Rows) -> Case:
    tokenizer, llm, dtype = model.require_tokenizer(), model.llm, model.dtype
    requests = _requests(rows)
    prompts = [tokenizer.encode(request.prompt, bos=True) for request in requests]
    budgets = [request.sampling.max_new_tokens for request in requests]
    total = sum(budgets)
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
        twin = llama_twins.transformers_twin(llm)
    except ImportError:
        note = "transformers is not installed"
    else:
        in_order = list(range(rows.count))
        by_length = sorted(in_order, key=lambda row: len(prompts[row]))
        pad = tokenizer.eos_id
        runs["transformers, padded batches"] = lambda: _padded(twin, prompts, budgets, in_order, rows.batch, pad)
        if context.device.type != "cuda":
            runs["transformers, prompts sorted"] = lambda: _padded(twin, prompts, budgets, by_length, rows.batch, pad)
    return Case(
        f"{size}, {rows.count} rows, batch {rows.batch}, prompts of {min(map(len, prompts))} to "
        f"{max(map(len, prompts))} tokens, answers of {min(budgets)} to {max(budgets)}, "
        f"{str(dtype).removeprefix('torch.')}",
        {name: _timed(context, run, budgets) for name, run in runs.items()},
        _work(llm, prompts, budgets, rows.batch, dtype),
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


def _timed(context: Context, run: Callable[[], list[Tensor]], budgets: Sequence[int]) -> Callable[[], Sample]:
    def call() -> Sample:
        with context.timer() as timer:
            answers = run()
        if [len(answer) for answer in answers] != list(budgets):
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


def _padded(
    twin: Any, prompts: Sequence[list[int]], budgets: Sequence[int], order: Sequence[int], batch: int, pad: int
) -> list[Tensor]:
    """``generate`` on batches padded on the left, each as long as its longest answer; surplus tokens are cut off."""
    answers: dict[int, Tensor] = {}
    device = twin.lm_head.weight.device
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = max(len(prompts[row]) for row in part)
        ids = torch.tensor([[pad] * (longest - len(prompts[row])) + prompts[row] for row in part], device=device)
        real = torch.tensor(
            [[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in part], device=device
        )
        out = twin.generate(
            ids,
            attention_mask=real,
            max_new_tokens=max(budgets[row] for row in part),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad,
        ).cpu()
        for index, row in enumerate(part):
            answers[row] = out[index, longest : longest + budgets[row]]
    return [answers[row] for row in range(len(prompts))]


def _work(llm: Any, prompts: Sequence[list[int]], budgets: Sequence[int], batch: int, dtype: torch.dtype) -> Work:
    """Arithmetic of every token; the weights once for each pass of a batch that is always full."""
    flops = 0.0
    kv = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * dtype.itemsize
    read = written = 0.0
    for prompt, new in zip(prompts, budgets, strict=True):
        tokens = len(prompt) + new - 1
        flops += 2 * (llama_twins.num_weights(llm) * tokens + llm.lm_head.weight.numel() * new)
        flops += llama_twins.attention_flops(llm, tokens)
        read += kv * sum(range(len(prompt), tokens))
        written += kv * tokens
    passes = max(max(budgets), -(-sum(budgets) // batch))
    return Work(flops, read + llama_twins.weight_bytes(llm) * passes, written, dtype=dtype)
