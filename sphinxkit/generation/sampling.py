"""Chooses the next token of a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.to_device import to_device


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options for choosing tokens and ending an answer.

    Args:
        max_new_tokens: Maximum length of an answer.
        temperature: Divisor of the logits; 0 is greedy decoding.
        top_p: Nucleus sampling: keep a token if the probability mass before it is at most this.
        stop: Strings that end an answer. They are searched in the generated text only, not in the prompt.
        seed: Seed of the sequence's own random generator, for reproducible sampling.

    Raises:
        DataError: A value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", _whole("max_new_tokens", self.max_new_tokens))
        object.__setattr__(self, "temperature", _real("temperature", self.temperature))
        object.__setattr__(self, "top_p", _real("top_p", self.top_p))
        object.__setattr__(self, "stop", stop_strings(self.stop))
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise DataError(f"temperature must be 0 (greedy) or more, and finite; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p must be in (0, 1], got {self.top_p}")
        if any(not stop for stop in self.stop):
            raise DataError("a stop string is empty")
        if self.seed is not None:
            object.__setattr__(self, "seed", _whole("seed", self.seed))
            if not 0 <= self.seed < 2**63:
                raise DataError(f"seed must be in [0, 2**63), got {self.seed}")


def _whole(name: str, value: object) -> int:
    """A whole number of any type (2, 2.0, numpy.int64(2)) as an int."""
    if not isinstance(value, bool):
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real) and float(value).is_integer():
            return int(float(value))
    raise DataError(f"{name} must be a whole number, got {value!r:.60}")


def _real(name: str, value: object) -> float:
    """A number of any type as a float."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            raise DataError(f"{name} is beyond all floats") from None
    raise DataError(f"{name} must be a number, got {value!r:.60}")


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Normalise one stop string, several, or none to a tuple.

    Args:
        stop: A text, a sequence of texts, or None.
    Raises:
        DataError: Something else.
    """
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    if isinstance(stop, Sequence) and all(isinstance(text, str) for text in stop):
        return tuple(stop)
    raise DataError(f"stop must be a text or several, got {stop!r:.60}")


def top_p_probs(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the distribution for top-p sampling, most likely token first.

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
    # relative to the largest, so that no temperature makes infinities
    logits = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    probs = torch.softmax(logits / max(temperature, torch.finfo(torch.float32).tiny), dim=-1)
    probs, ids = torch.sort(probs, dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    return probs / probs.sum(-1, keepdim=True), ids


NOT_FINITE = -1
"""Stands for the next token where no logit could be compared: the largest is NaN or infinite."""


def not_finite(what: str) -> DataError:
    """The error for logits that are not finite.

    Args:
        what: Names the source of the logits in the message.
    """
    return DataError(
        f"{what}: the logits are not finite (NaN or infinity). Either the weights hold such values (sphinxkit verify; "
        "another copy of the checkpoint), or 16 bits are too few for this model (dtype float32, or bfloat16 instead of "
        "float16)"
    )


class TokenChoices:
    """Restricts logits to the tokens that may be generated: the tokenizer's, and those that end an answer.

    A vocabulary may have more rows than the tokenizer has tokens (padding to a multiple of 64, or added tokens). Those
    rows have no text.

    Args:
        num_tokens: Size of the tokenizer's vocabulary; ids from here on are not chosen.
        end_ids: Token ids that end an answer; always allowed.
    """

    def __init__(self, num_tokens: int, end_ids: Iterable[int] = ()) -> None:
        self._num_tokens = num_tokens
        self._beyond = sorted(token for token in end_ids if token >= num_tokens)
        self._forbidden: Tensor | None = None

    def restrict(self, logits: Tensor) -> Tensor:
        """Remove forbidden tokens from the logits, or set them to minus infinity.

        Shape:
            logits: (..., V)
            return: (..., V'), V' <= V: a tail of forbidden ids is cut off
        """
        size = logits.shape[-1]
        if size <= self._num_tokens:
            return logits
        if not self._beyond:
            return logits[..., : self._num_tokens]
        if self._forbidden is None or self._forbidden.device != logits.device:
            forbidden = [token >= self._num_tokens and token not in self._beyond for token in range(size)]
            self._forbidden = to_device(forbidden, logits.device, torch.bool)
        return logits.masked_fill(self._forbidden, -math.inf)

    def most_likely(self, logits: Tensor) -> Tensor:
        """The most likely token, or ``NOT_FINITE``.

        Shape:
            logits: (..., V)
            return: (...) int64
        """
        highest, tokens = self.restrict(logits).max(dim=-1)  # NaN counts as the highest
        return tokens.masked_fill(~highest.isfinite(), NOT_FINITE)

    def with_log_probs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Chosen tokens and their log-probabilities in one tensor, which goes to the host at once.

        Args:
            logits: Of the next tokens.
            tokens: The chosen ones; ``NOT_FINITE`` keeps its sign and has any log-probability.
        Shape:
            logits: (..., V)
            tokens: (...) int64
            return: (..., 2) float32, which holds every id exactly
        """
        logits = self.restrict(logits).float()
        chosen = logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
        return torch.stack((tokens.float(), chosen - logits.logsumexp(dim=-1)), dim=-1)


class Sampled(Protocol):
    """What a ``Sampler`` needs of a sequence; ``sequence.GeneratedSequence`` is one."""

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        ...

    def draw(self) -> Tensor:
        """The next uniform random number (1,) of the sequence."""
        ...


class Sampler:
    """Chooses the next tokens of a batch on the device, without synchronising with the host.

    The host sends the sampling options and one random number per sequence and step to the device beforehand.

    Args:
        sequences: The sequences, in the order of the logits' rows.
        num_steps: Number of calls of ``choose``.
        device: Of the logits.
        choices: Allowed tokens.
    """

    def __init__(
        self, sequences: Sequence[Sampled], num_steps: int, device: torch.device, choices: TokenChoices
    ) -> None:
        self._choices = choices
        alike: dict[tuple[float, float], list[int]] = {}
        for index, sequence in enumerate(sequences):
            if sequence.sampling.temperature > 0:
                alike.setdefault((sequence.sampling.temperature, sequence.sampling.top_p), []).append(index)
        self._groups: list[tuple[float, float, Tensor, Iterator[Tensor]]] = []
        for (temperature, top_p), members in alike.items():
            draws = [torch.cat([sequences[index].draw() for _ in range(num_steps)]) for index in members]
            on_device = to_device(torch.stack(draws, dim=1), device)
            self._groups.append((temperature, top_p, to_device(members, device), iter(on_device)))

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each sequence; ``NOT_FINITE`` where its logits are not finite.

        Args:
            logits: Of the next token.
        Shape:
            logits: (B, V)
            return: (B,) int64
        """
        chosen = self._choices.most_likely(logits)
        if self._groups:
            logits = self._choices.restrict(logits)
        for temperature, top_p, where, draws in self._groups:
            sampled = _sample(logits[where], temperature, top_p, next(draws))
            chosen[where] = torch.where(chosen[where] == NOT_FINITE, chosen[where], sampled)
        return chosen


def _sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    probs, ids = top_p_probs(logits, temperature, top_p)
    index = (probs.cumsum(-1) <= draws[:, None]).sum(-1, keepdim=True)
    # the last kept token, should rounding leave the total below the draw; the first one where nothing can be compared
    index = torch.minimum(index, (probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return ids.gather(-1, index).squeeze(-1)
