"""The LLaMA backbone: decoder, key-value cache, attention backends and sizes."""

from __future__ import annotations

from sphinxkit.llama import backends
from sphinxkit.llama.accelerator import Accelerator
from sphinxkit.llama.attention import Attention, AttentionContext
from sphinxkit.llama.backends.base import AttentionBackend, AttentionPattern
from sphinxkit.llama.base import registry
from sphinxkit.llama.block import LlamaBlock
from sphinxkit.llama.cache import CacheWrite, KVCache
from sphinxkit.llama.layers import RMSNorm, SwiGLU
from sphinxkit.llama.model import LlamaModel
from sphinxkit.llama.moe import Experts, MixtureOfExperts, MoEOptions
from sphinxkit.llama.rope import RopeScaling, apply_rope, precompute_freqs_cis
from sphinxkit.llama.sizes import ffn_hidden_dim, llama, llama2_7b, llama2_13b, tinyllama_1b

register = registry.register
create = registry.build
names = registry.names

__all__ = [
    "Accelerator",
    "Attention",
    "AttentionBackend",
    "AttentionContext",
    "AttentionPattern",
    "CacheWrite",
    "Experts",
    "KVCache",
    "LlamaBlock",
    "LlamaModel",
    "MixtureOfExperts",
    "MoEOptions",
    "RMSNorm",
    "RopeScaling",
    "SwiGLU",
    "apply_rope",
    "backends",
    "create",
    "ffn_hidden_dim",
    "llama",
    "llama2_7b",
    "llama2_13b",
    "names",
    "precompute_freqs_cis",
    "register",
    "registry",
    "tinyllama_1b",
]
