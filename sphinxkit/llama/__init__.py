"""The LLaMA backbone: decoder, key-value cache, attention backends and sizes."""

from __future__ import annotations

from sphinxkit.llama import backends
from sphinxkit.llama.attention import Attention, AttentionContext
from sphinxkit.llama.backends import AttentionBackend, AttentionPattern
from sphinxkit.llama.cache import CacheWrite, KVCache
from sphinxkit.llama.graphs import DecodeGraphs
from sphinxkit.llama.layers import RMSNorm, SwiGLU, apply_rope, precompute_freqs_cis
from sphinxkit.llama.model import LlamaBlock, LlamaModel
from sphinxkit.llama.quantization import QuantizedLinear, quantize
from sphinxkit.llama.sizes import ffn_hidden_dim, llama, llama2_7b, llama2_13b, tinyllama_1b
from sphinxkit.registry import Registry

registry: Registry[LlamaModel] = Registry(
    "language model",
    {"llama": llama, "llama2_7b": llama2_7b, "llama2_13b": llama2_13b, "tinyllama_1b": tinyllama_1b},
)
register = registry.register
create = registry.build
names = registry.names

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionContext",
    "AttentionPattern",
    "CacheWrite",
    "DecodeGraphs",
    "KVCache",
    "LlamaBlock",
    "LlamaModel",
    "QuantizedLinear",
    "RMSNorm",
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
    "quantize",
    "register",
    "registry",
    "tinyllama_1b",
]
