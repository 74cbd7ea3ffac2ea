"""One sequence of a batch: its tokens, its end, and the text that is safe to show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation.prompt_lookup import PromptLookup
from sphinxkit.generation.sampling import NOT_FINITE, Sampling, not_finite

if TYPE_CHECKING:
    from sphinxkit.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated text for one prompt.

    Args:
        text: Generated text, without the stop string.
        token_ids: Tokens of ``text``, without end-of-sentence and stop string.
        finish_reason: "eos" (an id that ends an answer), "stop" (a stop string appeared) or "length"
            (``max_new_tokens`` or the context used up).
        num_drafted: Tokens that speculative decoding drafted; not compared by ``==``.
        num_accepted: Number of drafted tokens that the model confirmed.
        confidence: Mean log-probability (natural) of the answer's tokens under the model, whatever the temperature; of
            an empty answer, of the token that ended it. It compares answers of one model; not compared by ``==``.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_drafted: int = field(default=0, compare=False)
    num_accepted: int = field(default=0, compare=False)
    confidence: float | None = field(default=None, compare=False)


class GeneratedSequence:
    """A sequence during generation; collects tokens until it ends.

    Stop strings are searched in decoded text, because different tokens can give the same text. The cost per token does
    not depend on the length.

    Args:
        tokenizer: Turns tokens into text.
        sampling: Sampling options of this sequence.
        prompt_ids: Token ids of the prompt's text, searched for drafts.
        num_draft_tokens: Maximum draft length of prompt lookup; None: no drafts.
        end_ids: Token ids that end it, in addition to end-of-sentence.
    Raises:
        DataError: Drafts are requested for a sampled sequence, or the draft length is not positive.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        prompt_ids: Sequence[int] = (),
        num_draft_tokens: int | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        _check_draft(num_draft_tokens)
        if num_draft_tokens is not None and sampling.temperature > 0:
            raise DataError(f"num_draft_tokens is for greedy decoding, but temperature is {sampling.temperature}")
        self.sampling = sampling
        self.token_ids: list[int] = []
        """Tokens of the text."""
        self.generated_ids: list[int] = []
        """Every generated token, also end-of-sentence and those of a stop string."""
        self.log_probs: list[float] = []
        """Log-probability of every generated token."""
        self.finish_reason: FinishReason | None = None
        self.num_drafted = 0
        self.num_accepted = 0
        self._end_ids = frozenset((tokenizer.eos_id, *end_ids))
        self._decoder = tokenizer.stream()
        self._incomplete_bytes = tokenizer.incomplete_bytes
        self._num_draft_tokens = num_draft_tokens
        self._lookup = None if num_draft_tokens is None else PromptLookup(prompt_ids)
        self._pieces: list[str] = []
        self._ends: list[int] = []  # length of the text after each token
        self._length = 0
        self._tail = ""  # the end of the text, in which a stop string may have begun
        self._pending: list[str] = []  # text that was not shown yet
        self._longest_overlap = max((len(stop) for stop in sampling.stop), default=1) - 1
        # uniform numbers come from the CPU, so that a seed gives the same draws on every device
        self._generator = torch.Generator() if sampling.temperature > 0 else None
        if self._generator is not None and sampling.seed is None:
            self._generator.seed()
        elif self._generator is not None and sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)

    def draw(self) -> Tensor:
        """The next uniform random number (1,) of this sequence."""
        return torch.rand(1, generator=self._generator, dtype=torch.float32, device="cpu")

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.sampling.max_new_tokens - len(self.token_ids)

    @property
    def is_drafting(self) -> bool:
        """Whether it drafts tokens; it then needs each token before the next pass."""
        return self._lookup is not None

    def draft(self) -> list[int]:
        """Draft tokens, limited by the number that may still be generated."""
        if self._lookup is None or self._num_draft_tokens is None:
            return []
        return self._lookup.draft(min(self._num_draft_tokens, self.num_remaining - 1))

    def append(self, token: int, log_prob: float) -> None:
        """Take the next token and its log-probability; ``sampling.NOT_FINITE`` ends the sequence with an error."""
        if token == NOT_FINITE:
            self._finish("error")
            return
        self.generated_ids.append(token)
        self.log_probs.append(log_prob)
        if self._lookup is not None:
            self._lookup.append(token)
        if token in self._end_ids:
            self._finish("eos")
            return
        self.token_ids.append(token)
        self._grow(self._decoder.feed(token))
        if self.finish_reason is None and self.num_remaining <= 0:
            self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        tail = self._decoder.finish()
        if tail:
            self._ends.pop()
            self._grow(tail)

    def _grow(self, piece: str) -> None:
        """Add decoded text; cut it where a stop string begins."""
        searched = self._tail + piece
        begin = self._length - len(self._tail)
        self._length += len(piece)
        self._pieces.append(piece)
        self._pending.append(piece)
        self._ends.append(self._length)
        self._tail = searched[len(searched) - min(self._longest_overlap, len(searched)) :]
        found = [index for stop in self.sampling.stop if (index := searched.find(stop)) >= 0]
        if found:
            cut = begin + min(found)
            self.token_ids = [token for token, end in zip(self.token_ids, self._ends, strict=True) if end <= cut]
            self.finish_reason = "stop"
            self._pieces = ["".join(self._pieces)[:cut]]
            if not self._pieces[0].endswith("\ufffd"):  # the stop string's own first bytes stand for no text before it
                partial = self._incomplete_bytes(self.token_ids)
                self.token_ids = self.token_ids[: len(self.token_ids) - partial]
            self._pending = ["".join(self._pending)[: cut - self._length]]

    def new_text(self) -> str:
        """New text that cannot become part of a stop string."""
        text = "".join(self._pending)
        held = 0
        if self.finish_reason is None:
            held = max((_overlap(self._tail, stop) for stop in self.sampling.stop), default=0)
        self._pending = [text[len(text) - held :]]
        return text[: len(text) - held]

    def result(self) -> Generation:
        """The finished sequence.

        Raises:
            DataError: The model's logits were not finite.
        """
        reason = self.finish_reason or "length"
        if reason == "error":
            raise not_finite(f"after {len(self.generated_ids)} generated tokens")
        told = self.log_probs[: len(self.token_ids)] or self.log_probs[:1]
        return Generation(
            "".join(self._pieces),
            self.token_ids,
            reason,
            self.num_drafted,
            self.num_accepted,
            sum(told) / len(told) if told else None,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _check_draft(num_tokens: object) -> None:
    if num_tokens is not None and not (isinstance(num_tokens, Integral) and int(num_tokens) >= 1):
        raise DataError(f"num_draft_tokens must be at least 1 token, or None; got {num_tokens!r:.40}")
