"""Attention backends under one signature: xformers, torch's SDPA, and plain matrix products."""

from __future__ import annotations

from sphinxkit.llama.backends.base import HALF_DTYPES, AttentionBackend, AttentionPattern, registry
from sphinxkit.llama.backends.eager import EagerAttention
from sphinxkit.llama.backends.sdpa import SDPAAttention
from sphinxkit.llama.backends.xformers import AutoAttention, XFormersAttention, xformers_fault

__all__ = [
    "HALF_DTYPES",
    "AttentionBackend",
    "AttentionPattern",
    "AutoAttention",
    "EagerAttention",
    "SDPAAttention",
    "XFormersAttention",
    "registry",
    "xformers_fault",
]
