"""How likely a model thinks a continuation is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sphinxkit.errors import DataError
from sphinxkit.generation import TokenChoices, check_context, not_finite
from sphinxkit.sphinx_model.images import ImageInput, encode_each, list_images
from sphinxkit.sphinx_model.multimodal import hidden_states, num_positions
from sphinxkit.sphinx_model.parts import ModelParts
from sphinxkit.to_device import to_device


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is.

    Args:
        log_likelihood: Sum over its tokens, natural logarithm.
        num_tokens: How many they are.
        is_greedy: Whether greedy decoding would have written exactly these tokens.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool

    @property
    def mean_nll(self) -> float:
        """Negative log-likelihood per token; its exponential is the perplexity."""
        return -self.log_likelihood / self.num_tokens


@torch.no_grad()
def score(
    model: ModelParts,
    contexts: Sequence[str],
    continuations: Sequence[str],
    images: Sequence[ImageInput | None] | None,
) -> list[Score]:
    """See ``SphinxModel.score``."""
    tokenizer = model.require_tokenizer()
    if isinstance(contexts, str) or isinstance(continuations, str):
        raise DataError("score: contexts and continuations are lists of texts, got a single text")
    for texts in (contexts, continuations):
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"score: contexts and continuations are lists of texts, got {texts!r:.60}")
    if len(contexts) != len(continuations) or not contexts:
        raise DataError(f"score: {len(contexts)} contexts but {len(continuations)} continuations")
    pictures = list_images(images, len(contexts))
    choices = TokenChoices(tokenizer.vocab_size, model.end_ids)
    scores = []
    for row, (context, continuation, picture) in enumerate(zip(contexts, continuations, pictures, strict=True)):
        ids = tokenizer.encode(context + continuation, bos=True)
        start = len(tokenizer.encode(context, bos=True))
        if start >= len(ids):
            raise DataError(f"score: continuation {row} {continuation!r} adds no token to its context")
        slots = 0 if picture is None else model.require_vision().num_tokens
        positions = num_positions(len(ids), slots)
        check_context(f"score: row {row}", positions, model.llm.max_seq_len, num_image_tokens=slots)
        images_of_row = None if picture is None else torch.stack(encode_each(model, [picture]))
        token_ids = to_device([ids], model.device)
        hidden = hidden_states(model.llm, token_ids, images_of_row)[0, start - 1 : -1]
        logits = model.llm.lm_head(hidden).float()
        if not bool(logits.isfinite().all()):
            raise not_finite(f"score: row {row}")
        targets = token_ids[0, start:]
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).sum()
        is_greedy = bool((choices.most_likely(logits) == targets).all())
        scores.append(Score(float(chosen), len(targets), is_greedy))
    return scores
