"""LLaMA in the sizes that SPHINX uses, and with configurable numbers."""

from __future__ import annotations

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


@registry.register("llama")
def llama(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    hidden_dim: int | None = None,
    multiple_of: int = 256,
    ffn_dim_multiplier: float | None = None,
    vocab_size: int = 32000,
    max_seq_len: int = 4096,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: float | None = None,
    attention: str = "auto",
) -> LlamaModel:
    """A LLaMA with configurable numbers; see ``LlamaModel`` for their meaning.

    Args:
        embed_dim: Width of a token.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; None means as many as query heads.
        hidden_dim: Width of the feed-forward layers; None means ``ffn_hidden_dim(embed_dim, multiple_of,
            ffn_dim_multiplier)``.
        multiple_of: For that rule only.
        ffn_dim_multiplier: For that rule only.
        vocab_size: Tokens of the vocabulary; LLaMA's has 32000.
        max_seq_len: Longest sequence; 4096 is LLaMA 2's context and what LLaMA2-Accessory loads every size with.
        norm_eps: Of every norm.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Factor on the positions.
        attention: Name of an attention backend.
    Raises:
        ShapeError: A size is not positive or the heads do not divide the width.
        RegistryError: The attention backend is unknown.
    """
    if hidden_dim is None:
        hidden_dim = ffn_hidden_dim(embed_dim, multiple_of, ffn_dim_multiplier)
    return LlamaModel(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden_dim=hidden_dim,
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention=attention,
    )


@registry.register("llama2_7b")
def llama2_7b(
    *,
    embed_dim: int = 4096,
    num_layers: int = 32,
    num_heads: int = 32,
    num_kv_heads: int | None = None,
    hidden_dim: int = 11008,
    vocab_size: int = 32000,
    max_seq_len: int = 4096,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: float | None = None,
    attention: str = "auto",
) -> LlamaModel:
    """LLaMA 2 of 6.74 billion parameters; the arguments are those of ``llama``.

    Source: LLaMA 2, arXiv:2307.09288, table 1 and params.json of the release.
    """
    return llama(**locals())


@registry.register("llama2_13b")
def llama2_13b(
    *,
    embed_dim: int = 5120,
    num_layers: int = 40,
    num_heads: int = 40,
    num_kv_heads: int | None = None,
    hidden_dim: int = 13824,
    vocab_size: int = 32000,
    max_seq_len: int = 4096,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: float | None = None,
    attention: str = "auto",
) -> LlamaModel:
    """LLaMA 2 of 13.0 billion parameters; the arguments are those of ``llama``.

    Source: LLaMA 2, arXiv:2307.09288, table 1 and params.json of the release.
    """
    return llama(**locals())


@registry.register("tinyllama_1b")
def tinyllama_1b(
    *,
    embed_dim: int = 2048,
    num_layers: int = 22,
    num_heads: int = 32,
    num_kv_heads: int | None = 4,
    hidden_dim: int = 5632,
    vocab_size: int = 32000,
    max_seq_len: int = 4096,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: float | None = None,
    attention: str = "auto",
) -> LlamaModel:
    """TinyLlama of 1.10 billion parameters; the arguments are those of ``llama``.

    It was pretrained on sequences of 2048 tokens; SPHINX-Tiny is loaded with 4096.

    Source: TinyLlama, arXiv:2401.02385, table 1.
    """
    return llama(**locals())
