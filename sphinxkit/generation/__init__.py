"""Autoregressive decoding over a KV cache: sampling, stop strings, streaming, batches of any prompt lengths."""

from __future__ import annotations

from sphinxkit.generation.batch import ContinuousBatch
from sphinxkit.generation.cache_rows import copy_rows
from sphinxkit.generation.decoder import Decoder
from sphinxkit.generation.lookup import PromptLookup
from sphinxkit.generation.prefill import prefill_groups
from sphinxkit.generation.rows import FinishReason, Generation, Row
from sphinxkit.generation.sampling import Sampling, stop_strings, top_p_probs

__all__ = [
    "ContinuousBatch",
    "Decoder",
    "FinishReason",
    "Generation",
    "PromptLookup",
    "Row",
    "Sampling",
    "copy_rows",
    "prefill_groups",
    "stop_strings",
    "top_p_probs",
]
