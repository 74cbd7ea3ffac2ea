"""Autoregressive decoding over a KV cache: sampling, stop strings, streaming, batches of any prompt lengths."""

from __future__ import annotations

from sphinxkit.generation.context import answer_length, check_context, truncate_left
from sphinxkit.generation.continuous_batching import ContinuousBatch
from sphinxkit.generation.decoding import Decoder
from sphinxkit.generation.prefill import prefill_groups
from sphinxkit.generation.prompt_lookup import PromptLookup
from sphinxkit.generation.sampling import Sampling, TokenChoices, not_finite, stop_strings, top_p_probs
from sphinxkit.generation.sequence import FinishReason, GeneratedSequence, Generation

__all__ = [
    "ContinuousBatch",
    "Decoder",
    "FinishReason",
    "GeneratedSequence",
    "Generation",
    "PromptLookup",
    "Sampling",
    "TokenChoices",
    "answer_length",
    "check_context",
    "not_finite",
    "prefill_groups",
    "stop_strings",
    "top_p_probs",
    "truncate_left",
]
