"""Autoregressive decoding over a KV cache: sampling, stop strings, streaming, batches of any prompt lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinxkit.errors import DataError

if TYPE_CHECKING:
    from sphinxkit.llama import LlamaModel
    from sphinxkit.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote for one prompt.

    Args:
        text: Without the stop string.
        token_ids: The tokens of ``text``: no end-of-sentence, nothing of a stop string.
        finish_reason: "eos", "stop" (a stop string appeared) or "length" (``max_new_tokens`` or the context used up).
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when a row ends.

    Args:
        max_new_tokens: Per row.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: Tokens are kept in order of probability while the mass before them is at most this.
        stop: Strings that end a row; they are looked for in what the model wrote, never in the prompt.
        seed: Makes sampling repeatable; row i of a batch draws from ``seed + i``, whatever the other rows do.

    Raises:
        DataError: A value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise DataError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p must be in (0, 1], got {self.top_p}")
        if any(not stop for stop in self.stop):
            raise DataError("a stop string is empty")


def top_p_probs(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """The distribution that top-p sampling draws from, most likely token first.

    Args:
        logits: Of the next token.
        temperature: Positive.
        top_p: A token is kept if the probability mass of the tokens before it is at most this.

    Shape:
        logits: (..., V)
        return: probabilities (..., V), dropped ones 0, the rest summing to 1; and their token ids (..., V)
    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751; the border case as in
        LLaMA2-Accessory, accessory/model/meta.py.
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    probs, ids = torch.sort(probs, dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    return probs / probs.sum(-1, keepdim=True), ids


class _Sampler:
    """Chooses the next token of every row."""

    def __init__(self, sampling: Sampling, num_rows: int) -> None:
        self._sampling = sampling
        # uniform numbers come from the CPU, so that a seed gives the same draws on every device
        self._generators = [torch.Generator() for _ in range(num_rows)] if sampling.temperature > 0 else []
        for row, generator in enumerate(self._generators):
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed + row)

    def choose(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Next token (B,) of each of ``rows``, whose logits (B, V) these are."""
        if self._sampling.temperature == 0:
            return logits.argmax(dim=-1)
        probs, ids = top_p_probs(logits, self._sampling.temperature, self._sampling.top_p)
        generators = [self._generators[row] for row in rows]
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        index = (probs.cumsum(-1) <= draws.to(probs.device)[:, None]).sum(-1, keepdim=True)
        # the last kept token, should rounding leave the total below the draw
        index = torch.minimum(index, (probs > 0).sum(-1, keepdim=True) - 1)
        return ids.gather(-1, index).squeeze(-1)


@dataclass
class _Row:
    """What one row has written, and how much of it may be shown."""

    tokenizer: Tokenizer
    sampling: Sampling
    budget: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.stream()
        self._text = ""
        self._ends: list[int] = []  # length of the text after each token
        self._shown = 0

    def push(self, token: int) -> None:
        """Take the next token."""
        if token == self.tokenizer.eos_id:
            self._finish("eos")
            return
        self.token_ids.append(token)
        self._grow(self._decoder.feed(token))
        if self.finish_reason is None and len(self.token_ids) >= self.budget:
            self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        tail = self._decoder.finish()
        if tail:
            self._ends.pop()
            self._grow(tail)

    def _grow(self, piece: str) -> None:
        """Add decoded text; cut it where a stop string begins."""
        longest = max((len(stop) for stop in self.sampling.stop), default=0)
        start = max(0, len(self._text) - longest + 1)
        self._text += piece
        self._ends.append(len(self._text))
        found = [index for stop in self.sampling.stop if (index := self._text.find(stop, start)) >= 0]
        if found:
            cut = min(found)
            self.token_ids = [token for token, end in zip(self.token_ids, self._ends, strict=True) if end <= cut]
            self._text = self._text[:cut]
            self.finish_reason = "stop"

    def take(self) -> str:
        """Text that has not been shown and can no longer become part of a stop string."""
        safe = len(self._text)
        if self.finish_reason is None:
            safe -= max((_overlap(self._text, stop) for stop in self.sampling.stop), default=0)
        fresh = self._text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return fresh

    def result(self) -> Generation:
        """The finished row."""
        return Generation(self._text, self.token_ids, self.finish_reason or "length")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Decoder:
    """Decodes a batch of embedded prompts; every ``step`` gives each unfinished row one more token.

    Rows that are finished leave the batch, so that they cost nothing.

    Args:
        llm: The language model.
        tokenizer: Turns tokens into text, which decides where a stop string is.
        prompts: Embedded prompts, image tokens included.
        sampling: For all rows.

    Shape:
        prompts: one (S_i, D) per row
    Raises:
        DataError: A prompt leaves no room for an answer in the model's context.
    """

    def __init__(self, llm: LlamaModel, tokenizer: Tokenizer, prompts: Sequence[Tensor], sampling: Sampling) -> None:
        lengths = [len(prompt) for prompt in prompts]
        for row, length in enumerate(lengths):
            if length >= llm.max_seq_len:
                raise DataError(
                    f"prompt {row} takes {length} positions, image included, which leaves no room in the context of "
                    f"{llm.max_seq_len}; shorten it, or pass truncate='left'"
                )
        budgets = [min(sampling.max_new_tokens, llm.max_seq_len - length) for length in lengths]
        self.rows = [_Row(tokenizer, sampling, budget) for budget in budgets]
        self._llm = llm
        self._prompts = list(prompts)
        self._sampler = _Sampler(sampling, len(prompts))
        self._active = list(range(len(prompts)))
        self._capacity = max(length + budget for length, budget in zip(lengths, budgets, strict=True))
        self._logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """Whether every row has finished."""
        return not self._active

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every unfinished row."""
        if self._logits is None:
            self._logits = self._prefill()
        chosen = self._sampler.choose(self._logits, self._active)
        tokens = chosen.tolist()
        for row, token in zip(self._active, tokens, strict=True):
            self.rows[row].push(token)
        going = [index for index, row in enumerate(self._active) if self.rows[row].finish_reason is None]
        if len(going) < len(self._active):
            self._active = [self._active[index] for index in going]
            if not going:
                return
            kept = torch.tensor(going, device=chosen.device)
            chosen = chosen[kept]
            self._cache.keep_rows(kept)
        logits: Tensor = self._llm(self._llm.embed(chosen[:, None]), cache=self._cache)
        self._logits = logits[:, -1]

    def _prefill(self) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device=self._prompts[0].device)
        embeds = pad_sequence(self._prompts, batch_first=True)
        self._prompts = []
        self._cache = self._llm.make_cache(len(lengths), self._capacity)
        logits: Tensor = self._llm(embeds, cache=self._cache, lengths=lengths, output_rows=lengths - 1)
        return logits[:, -1]

    def run(self) -> list[Generation]:
        """Decode until every row has finished."""
        while not self.is_done:
            self.step()
        return [row.result() for row in self.rows]

    def stream(self) -> Iterator[str]:
        """Decode a single row, yielding text as soon as it is certain."""
        while not self.is_done:
            self.step()
            piece = self.rows[0].take()
            if piece:
                yield piece
