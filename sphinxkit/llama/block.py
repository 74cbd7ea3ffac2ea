"""One decoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from sphinxkit.llama.attention import Attention, AttentionContext
from sphinxkit.llama.layers import RMSNorm, SwiGLU
from sphinxkit.llama.moe import MixtureOfExperts, MoEOptions


class LlamaBlock(nn.Module):
    """One decoder layer: attention, then feed-forward, each behind a norm and added to its input.

    Args:
        embed_dim: Width of a token, D.
        attention: Its attention, of the same width.
        hidden_dim: Width of the feed-forward layer.
        norm_eps: Of both norms.
        moe: Experts in place of the single feed-forward layer; None: none.
    Shape:
        x: (B, S, D)
        return: (B, S, D)
    Source: LLaMA, arXiv:2302.13971, section 2.2.
    """

    def __init__(
        self, embed_dim: int, attention: Attention, hidden_dim: int, norm_eps: float, moe: MoEOptions | None = None
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(embed_dim, norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(embed_dim, norm_eps)
        self.mlp: SwiGLU | MixtureOfExperts
        if moe is None:
            self.mlp = SwiGLU(embed_dim, hidden_dim)
        else:
            self.mlp = MixtureOfExperts(embed_dim, hidden_dim, moe)

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Apply to the tokens ``x`` (B, S, D); ``layer`` is the block's number, for the cache."""
        x = x + self.attention(self.attention_norm(x), context, layer)
        normed = self.mlp_norm(x)
        takers = (context.add_balance_loss,) if isinstance(self.mlp, MixtureOfExperts) else ()
        out: Tensor = x + self.mlp(normed, *takers)
        return out
