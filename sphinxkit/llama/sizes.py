"""LLaMA and its descendants in published sizes, and with configurable numbers."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from sphinxkit.errors import ShapeError
from sphinxkit.llama.base import registry
from sphinxkit.llama.model import LlamaModel


def ffn_hidden_dim(dim: int, multiple_of: int = 256, ffn_dim_multiplier: float | None = None) -> int:
    """Width of the feed-forward layers by Meta's rule.

    Two thirds of 4 * dim (the gate is a third matrix), times the multiplier, each cut to an integer, then rounded up.

    Args:
        dim: Width of the model.
        multiple_of: What the result is a multiple of.
        ffn_dim_multiplier: Factor before rounding; None means 1.
    Raises:
        ShapeError: ``dim`` or ``multiple_of`` is not positive.
    Source: LLaMA, arXiv:2302.13971, section 2.2; params.json of Meta's checkpoints (multiple_of, ffn_dim_multiplier).
    """
    if dim < 1 or multiple_of < 1:
        raise ShapeError(f"ffn_hidden_dim: dim and multiple_of must be at least 1, got {dim} and {multiple_of}")
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def _show_options(build: Callable[..., LlamaModel], **defaults: Any) -> None:
    """Give a builder the options of ``LlamaModel`` as its signature, with other defaults and what it has besides."""
    parameters = dict(inspect.signature(LlamaModel).parameters)
    own = [each for each in inspect.signature(build).parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    parameters |= {each.name: each for each in own}
    shown = [each.replace(default=defaults.get(name, each.default)) for name, each in parameters.items()]
    hints = typing.get_type_hints(LlamaModel.__init__) | typing.get_type_hints(build) | {"return": LlamaModel}
    build.__annotations__ = {name: hint for name, hint in hints.items() if name in (*parameters, "return")}
    shown_signature = inspect.Signature(shown, return_annotation="LlamaModel")
    build.__signature__ = shown_signature  # type: ignore[attr-defined]


def _size(name: str, source: str, **numbers: Any) -> Callable[..., LlamaModel]:
    """Register a builder of one size: every number of ``LlamaModel`` is an option whose default is that size's."""

    def build(**options: Any) -> LlamaModel:
        return LlamaModel(**{**numbers, **options})

    _show_options(build, **numbers)
    build.__name__ = build.__qualname__ = name
    family = source.split(",")[0]
    build.__doc__ = f"{family} of the size ``{name}``; the arguments are those of ``LlamaModel``.\n\nSource: {source}"
    return registry.register(name)(build)


@registry.register("llama")
def llama(
    *,
    embed_dim: int,
    hidden_dim: int | None = None,
    multiple_of: int = 256,
    ffn_dim_multiplier: float | None = None,
    vocab_size: int = 32000,
    **options: Any,
) -> LlamaModel:
    """A LLaMA with configurable numbers.

    Args:
        embed_dim: Width of a token.
        hidden_dim: Width of the feed-forward layers; None means ``ffn_hidden_dim(embed_dim, multiple_of,
            ffn_dim_multiplier)``.
        multiple_of: For that rule only.
        ffn_dim_multiplier: For that rule only.
        vocab_size: Tokens of the vocabulary; LLaMA's has 32000.
        **options: The other arguments of ``LlamaModel``; ``num_layers`` and ``num_heads`` have no default.
    Raises:
        ShapeError: A size is not positive or the heads do not divide the width.
        RegistryError: The attention backend is unknown.
    """
    if hidden_dim is None:
        hidden_dim = ffn_hidden_dim(embed_dim, multiple_of, ffn_dim_multiplier)
    return LlamaModel(embed_dim=embed_dim, hidden_dim=hidden_dim, vocab_size=vocab_size, **options)


_show_options(llama)

_LLAMA2 = "LLaMA 2, arXiv:2307.09288, table 1 and params.json of the release."
_LLAMA3 = "Llama 3, arXiv:2407.21783, table 3, and config.json of the release."
_QWEN2 = "Qwen2.5, arXiv:2412.15115, table 1, and config.json of the release."
_QWEN3 = "Qwen3, arXiv:2505.09388, table 1, and config.json of the release."
_SMOLLM2 = "SmolLM2, arXiv:2502.02737, and config.json of the release."

_ALIKE_LLAMA3 = {"num_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
_ALIKE_QWEN2 = {
    **{"vocab_size": 151936, "max_seq_len": 32768, "norm_eps": 1e-6, "rope_theta": 1e6},
    **{"qkv_bias": True, "tie_embeddings": True},
}
_ALIKE_QWEN3 = {
    **{"num_kv_heads": 8, "vocab_size": 151936, "max_seq_len": 40960, "norm_eps": 1e-6, "rope_theta": 1e6},
    **{"head_dim": 128, "qk_norm": True, "tie_embeddings": True},
}
_ALIKE_SMOLLM2 = {"vocab_size": 49152, "max_seq_len": 8192, "tie_embeddings": True}


def _sizes(embed_dim: int, num_layers: int, num_heads: int, hidden_dim: int, num_kv_heads: int | None = None) -> Any:
    sizes = {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim}
    return sizes if num_kv_heads is None else {**sizes, "num_kv_heads": num_kv_heads}


def _llama3_scaling(factor: float) -> dict[str, Any]:
    ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"type": "llama3", "factor": factor, "original_max_seq_len": 8192, **ramp}


_PLAIN = {"vocab_size": 32000, "max_seq_len": 4096}
_LONG = {"max_seq_len": 131072, "rope_scaling": _llama3_scaling(8.0)}
_LONG_SMALL = {"max_seq_len": 131072, "rope_scaling": _llama3_scaling(32.0), "tie_embeddings": True}

llama2_7b = _size("llama2_7b", _LLAMA2, **_PLAIN, **_sizes(4096, 32, 32, 11008))
llama2_13b = _size("llama2_13b", _LLAMA2, **_PLAIN, **_sizes(5120, 40, 40, 13824))
# pretrained on sequences of 2048 tokens; SPHINX-Tiny is loaded with 4096
tinyllama_1b = _size(
    "tinyllama_1b", "TinyLlama, arXiv:2401.02385, table 1.", **_PLAIN, **_sizes(2048, 22, 32, 5632, num_kv_heads=4)
)
llama3_8b = _size("llama3_8b", _LLAMA3, **{**_ALIKE_LLAMA3, **_sizes(4096, 32, 32, 14336), "max_seq_len": 8192})
llama3_1_8b = _size("llama3_1_8b", _LLAMA3, **{**_ALIKE_LLAMA3, **_LONG, **_sizes(4096, 32, 32, 14336)})
llama3_2_1b = _size("llama3_2_1b", _LLAMA3, **{**_ALIKE_LLAMA3, **_LONG_SMALL, **_sizes(2048, 16, 32, 8192)})
llama3_2_3b = _size("llama3_2_3b", _LLAMA3, **{**_ALIKE_LLAMA3, **_LONG_SMALL, **_sizes(3072, 28, 24, 8192)})
mistral_7b = _size(
    "mistral_7b",
    "Mistral 7B, arXiv:2310.06825, table 1, and config.json of version 0.1.",
    **_sizes(4096, 32, 32, 14336, num_kv_heads=8),
    vocab_size=32000,
    max_seq_len=32768,
    sliding_window=4096,
)
mixtral_8x7b = _size(
    "mixtral_8x7b",
    "Mixtral, arXiv:2401.04088, table 1, and config.json of version 0.1.",
    **_sizes(4096, 32, 32, 14336, num_kv_heads=8),
    vocab_size=32000,
    max_seq_len=32768,
    rope_theta=1e6,
    moe={"num_experts": 8, "num_experts_per_tok": 2},
)
yi_6b = _size(
    "yi_6b",
    "Yi, arXiv:2403.04652, and config.json of the release.",
    **_sizes(4096, 32, 32, 11008, num_kv_heads=4),
    vocab_size=64000,
    rope_theta=5e6,
)
qwen2_5_0_5b = _size("qwen2_5_0_5b", _QWEN2, **_ALIKE_QWEN2, **_sizes(896, 24, 14, 4864, 2))
qwen2_5_1_5b = _size("qwen2_5_1_5b", _QWEN2, **_ALIKE_QWEN2, **_sizes(1536, 28, 12, 8960, 2))
qwen2_5_3b = _size("qwen2_5_3b", _QWEN2, **_ALIKE_QWEN2, **_sizes(2048, 36, 16, 11008, 2))
qwen2_5_7b = _size(
    "qwen2_5_7b",
    _QWEN2,
    **{**_ALIKE_QWEN2, **_sizes(3584, 28, 28, 18944, 4), "vocab_size": 152064, "tie_embeddings": False},
)
qwen3_0_6b = _size("qwen3_0_6b", _QWEN3, **_ALIKE_QWEN3, **_sizes(1024, 28, 16, 3072))
qwen3_1_7b = _size("qwen3_1_7b", _QWEN3, **_ALIKE_QWEN3, **_sizes(2048, 28, 16, 6144))
qwen3_4b = _size("qwen3_4b", _QWEN3, **_ALIKE_QWEN3, **_sizes(2560, 36, 32, 9728))
qwen3_8b = _size("qwen3_8b", _QWEN3, **{**_ALIKE_QWEN3, **_sizes(4096, 36, 32, 12288), "tie_embeddings": False})
smollm2_135m = _size("smollm2_135m", _SMOLLM2, **_ALIKE_SMOLLM2, **_sizes(576, 30, 9, 1536, 3), rope_theta=1e5)
smollm2_360m = _size("smollm2_360m", _SMOLLM2, **_ALIKE_SMOLLM2, **_sizes(960, 32, 15, 2560, 5), rope_theta=1e5)
smollm2_1_7b = _size("smollm2_1_7b", _SMOLLM2, **_ALIKE_SMOLLM2, **_sizes(2048, 24, 32, 8192), rope_theta=1.3e5)
