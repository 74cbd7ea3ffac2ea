"""The LLaMA decoder: embeddings in, logits out, with or without a key-value cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.llama.accelerator import Accelerator
from sphinxkit.llama.attention import Attention, AttentionContext
from sphinxkit.llama.backends.base import AttentionBackend, AttentionPattern, registry
from sphinxkit.llama.block import LlamaBlock
from sphinxkit.llama.cache import CacheWrite, KVCache
from sphinxkit.llama.checks import check_cache, check_capacity, check_inputs, check_sizes
from sphinxkit.llama.layers import RMSNorm
from sphinxkit.llama.moe import parse_moe
from sphinxkit.llama.rope import parse_rope_scaling, precompute_freqs_cis
from sphinxkit.to_device import to_device

INIT_STD = 0.02  # our choice, as GPT-2's and Hugging Face's LLaMA


class LlamaModel(nn.Module):
    """LLaMA and its descendants with configurable sizes, fed with embeddings so that image tokens can join the words.

    The options cover LLaMA 1 to 3, Mistral, Yi, SmolLM2 (no option), Qwen2 (``qkv_bias``), Qwen3 (``qk_norm``) and
    Mixtral (``moe``).

    May be built under ``torch.device("meta")``: there are parameters and nothing else, no buffers. ``forward`` runs the
    modules as they are written here. ``prefill`` and ``decode``, which generate text, may be handed to an
    ``accelerator``.

    Args:
        vocab_size: Tokens of the vocabulary, V.
        embed_dim: Width of a token, D.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``, None means as many.
        hidden_dim: Width of the feed-forward layers, of each expert with ``moe`` (``sizes.ffn_hidden_dim`` has Meta's
            rule).
        max_seq_len: Longest sequence (with a cache: what it held included) that is accepted.
        norm_eps: Of every norm.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Factor on the positions, or a mapping with the fields of ``rope.RopeScaling``; None means 1.
        head_dim: Channels of a head, even; None means ``embed_dim / num_heads``.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether each head's query and key have an RMS norm in front of the rotation.
        sliding_window: Tokens that a token sees at most, itself included; None means all before it.
        tie_embeddings: Whether ``lm_head`` and ``embed_tokens`` are one matrix.
        moe: A mixture of experts in every layer: the fields of ``moe.MoEOptions`` (``num_experts``,
            ``num_experts_per_tok``); None: one feed-forward layer.
        attention: ``"auto"``, ``"xformers"``, ``"sdpa"``, ``"eager"`` or another name registered in
            ``llama.backends``. ``auto`` is xformers on CUDA in 16 bit where it works, else SDPA; a named backend that
            cannot run is an error at the first call.
    Shape:
        embeds: (B, S, D)
        return: (B, S, V)
    Raises:
        ShapeError: A size is not positive or the heads do not divide the width.
        RegistryError: The attention backend, or a type or key of ``rope_scaling`` or ``moe``, is unknown.
    Source: LLaMA 2, arXiv:2307.09288, appendix A.2.1; LLaMA2-Accessory, accessory/model/LLM/llama.py.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        hidden_dim: int,
        max_seq_len: int = 4096,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: float | dict[str, Any] | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        tie_embeddings: bool = False,
        moe: dict[str, Any] | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(
            vocab_size=vocab_size,
            embed_dim=embed_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            hidden_dim=hidden_dim,
            max_seq_len=max_seq_len,
            head_dim=head_dim,
            sliding_window=sliding_window,
        )
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.hidden_dim = hidden_dim
        self.max_seq_len = max_seq_len
        self.norm_eps = norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.sliding_window = sliding_window
        self.tie_embeddings = tie_embeddings
        self.moe = parse_moe(moe)
        self._scaling = parse_rope_scaling(rope_scaling)
        self.attention = attention
        self.attention_backend: AttentionBackend = registry.build(attention)
        self.accelerator: Accelerator[LlamaModel] | None = None
        self.embed_tokens = nn.Embedding(vocab_size, embed_dim)
        self.layers = nn.ModuleList(
            LlamaBlock(
                embed_dim,
                Attention(
                    embed_dim,
                    num_heads,
                    kv_heads,
                    self.head_dim,
                    qkv_bias=qkv_bias,
                    qk_norm_eps=norm_eps if qk_norm else None,
                ),
                hidden_dim,
                norm_eps,
                self.moe,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.lm_head = nn.Linear(embed_dim, vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make ``lm_head`` hold the very parameter of ``embed_tokens``, if the two are tied."""
        if self.tie_embeddings and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of token ids: (B, S) int64 -> (B, S, D)."""
        embeds: Tensor = self.embed_tokens(token_ids)
        return embeds

    def make_cache(
        self,
        batch_size: int,
        max_seq_len: int | None = None,
        *,
        num_kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache that fits this model.

        Args:
            batch_size: Rows.
            max_seq_len: Tokens of a row; None for the model's limit. An accelerator may round it up.
            num_kv_heads: Key and value heads on this device, where they are sharded; None for all.
            device: None for the parameters'.
            dtype: None for the parameters', but on a CPU at least float32: there torch's attention of one query takes
                3 to 5 times as long over 16-bit keys.
        Raises:
            ShapeError: ``max_seq_len`` is beyond the model's.
        """
        capacity = self.max_seq_len if max_seq_len is None else max_seq_len
        check_capacity(self, capacity)
        if self.accelerator is not None:
            capacity = self.accelerator.cache_capacity(capacity, self.max_seq_len)
        weight = self.norm.weight
        device = weight.device if device is None else torch.device(device)
        if dtype is None:
            dtype = torch.promote_types(weight.dtype, torch.float32) if device.type == "cpu" else weight.dtype
        return KVCache(
            self.num_layers,
            batch_size,
            capacity,
            self.num_kv_heads if num_kv_heads is None else num_kv_heads,
            self.head_dim,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        embeds: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        seq_lens: Sequence[int] | None = None,
        output_positions: Tensor | slice | None = None,
    ) -> Tensor:
        """Logits of the next token at each position: ``lm_head`` of ``hidden_states``, which has the arguments.

        Shape:
            embeds: (B, S, D)
            return: (B, S, V); with ``output_positions`` (B, length of the slice, V), (B, 1, V) or (B, R, V). The dtype
                is that of ``lm_head``.
        Raises:
            ShapeError: As ``hidden_states``.
            RegistryError: As ``hidden_states``.
        """
        hidden = self.hidden_states(
            embeds, cache=cache, lengths=lengths, seq_lens=seq_lens, output_positions=output_positions
        )
        logits: Tensor = self.lm_head(hidden)
        return logits

    def hidden_states(
        self,
        embeds: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        seq_lens: Sequence[int] | None = None,
        output_positions: Tensor | slice | None = None,
        balance_losses: list[Tensor] | None = None,
    ) -> Tensor:
        """What ``lm_head`` turns into logits: the last layer's output behind the final norm.

        Without ``cache`` and ``seq_lens`` every row is causal from position 0; padding on the right needs no mask.
        With a cache nothing is recorded for a backward pass.

        Args:
            embeds: Tokens as embeddings, from ``embed`` or elsewhere.
            cache: Tokens read before. Column j of row i is at position ``cache.lengths[i] + j``; afterwards the cache
                holds it too.
            lengths: With a cache: how many columns of each row are real, from the left (None: all). The others are
                padding: their logits mean nothing and the cache does not count them.
            seq_lens: Lengths of the samples packed in the single row: none sees another, and positions start at 0 in
                each.
            output_positions: Positions to return; the others stop after the last layer. A slice of
                the S axis, or indices (B,) or (B, R): one or R positions for each row.
            balance_losses: Takes the balance loss of every layer with experts (``moe.balance_loss``).
        Shape:
            embeds: (B, S, D)
            return: (B, S, D); with ``output_positions`` (B, length of the slice, D), (B, 1, D) or (B, R, D)
        Raises:
            ShapeError: Sizes disagree or a limit is passed; before any work.
            RegistryError: The attention backend that was asked for cannot run on this device.
        """
        check_inputs(self, embeds, cache, lengths, seq_lens, output_positions)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            context = self.attention_context(embeds, cache=cache, lengths=lengths, seq_lens=seq_lens)
            if balance_losses is not None:
                context = dataclasses.replace(context, add_balance_loss=balance_losses.append)
            hidden = self.run_layers(embeds, context)
            if cache is not None and context.cache_write is not None:
                cache.advance(context.cache_write)
            normed: Tensor = self.norm(select_positions(hidden, output_positions))
        return normed

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights: matrices and embeddings normal with deviation 0.02, norms 1, biases 0 (our choice).

        Args:
            generator: Source of randomness, on the parameters' device.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=INIT_STD, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    @torch.no_grad()
    def prefill(
        self,
        embeds: Tensor,
        cache: KVCache,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Read prompts: ``forward`` into a cache, for the logits of each row's last token alone.

        Args:
            embeds: Prompts, padded on the right.
            cache: What came before; holds the prompts afterwards.
            lengths: How many columns of each row are real; None: all.
            all_positions: Return the logits of every position, as needed to verify drafts.
        Shape:
            embeds: (B, S, D)
            return: (B, 1, V); with ``all_positions`` (B, S, V)
        Raises:
            ShapeError: As ``hidden_states``.
            RegistryError: As ``hidden_states``.
        """
        if self.accelerator is not None:
            check_inputs(self, embeds, cache, lengths, None, None)
            return self.accelerator.prefill(self, embeds, cache, lengths, all_positions)
        logits: Tensor = self(
            embeds, cache=cache, lengths=lengths, output_positions=None if all_positions else last_positions(lengths)
        )
        return logits

    @torch.no_grad()
    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """The decoding step: one token for every row, all real. Same as ``forward(embed(token_ids), cache=cache)``.

        Args:
            token_ids: The last token of each row.
            cache: What came before; holds ``token_ids`` afterwards.
        Shape:
            token_ids: (B, 1)
            return: (B, 1, V)
        Raises:
            ShapeError: The ids are not (B, 1) for the cache's rows; or as ``hidden_states``.
            RegistryError: As ``hidden_states``.
        """
        if token_ids.ndim != 2 or token_ids.shape[1] != 1:
            raise ShapeError(f"LLaMA: expected token ids ({cache.batch_size}, 1), got {tuple(token_ids.shape)}")
        check_cache(self, cache, len(token_ids))
        if self.accelerator is not None:
            return self.accelerator.decode(self, token_ids, cache)
        logits: Tensor = self(self.embed(token_ids), cache=cache)
        return logits

    def run_layers(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """All decoder layers, one after the other.

        Args:
            hidden: Embeddings.
            context: From ``attention_context``.
        Shape:
            hidden: (B, S, D)
            return: (B, S, D)
        """
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, context, index)
        return hidden

    def attention_context(
        self,
        embeds: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        seq_lens: Sequence[int] | None = None,
        backend: AttentionBackend | None = None,
    ) -> AttentionContext:
        """All that the layers share in a pass: positions, pattern, and what the attention backend makes of them.

        Args:
            embeds: As in ``hidden_states``.
            cache: As in ``hidden_states``; nothing is written yet.
            lengths: As in ``hidden_states``.
            seq_lens: As in ``hidden_states``.
            backend: In place of the model's own.
        Shape:
            embeds: (B, S, D)
        Raises:
            ShapeError: A row of the cache would not hold its tokens.
            RegistryError: The backend cannot run on this device.
        """
        batch_size, width = embeds.shape[:2]
        write = None if cache is None else cache.prepare_write(width, lengths)
        columns = torch.arange(width, device=embeds.device)
        if seq_lens is not None:
            columns = torch.cat([columns[:length] for length in seq_lens])
        positions = columns[None] if write is None else write.starts[:, None] + columns
        reads_cache = write is not None and write.start != 0
        longest = width if cache is None or not reads_cache else cache.max_seq_len
        window = self.window(longest if seq_lens is None else max(seq_lens))
        pattern = AttentionPattern(
            batch_size,
            width,
            embeds.device,
            seq_lens=None if seq_lens is None else tuple(seq_lens),
            write=write if reads_cache else None,
            window=window,
        )
        dtype = cache.dtype if cache is not None and reads_cache else _compute_dtype(embeds)
        backend = (backend or self.attention_backend).resolve(embeds.device, dtype, self.head_dim, window)
        return AttentionContext(
            freqs_cis=self.freqs_cis(positions, _sequence_lengths(positions, write, seq_lens)),
            pattern=pattern,
            backend=backend,
            state=backend.prepare(pattern, dtype),
            cache=cache,
            cache_write=write,
        )

    def window(self, longest: int) -> int | None:
        """The sliding window, where sequences of up to ``longest`` tokens can be longer than it."""
        return self.sliding_window if self.sliding_window is not None and longest > self.sliding_window else None

    def freqs_cis(self, positions: Tensor, lengths: Tensor | None = None, *, as_pairs: bool = False) -> Tensor:
        """The rotations of this model; see ``rope.precompute_freqs_cis``.

        Args:
            positions: Integer positions.
            lengths: Of the sequence that each position belongs to; None: a row's last position.
            as_pairs: Real and imaginary parts.
        Shape:
            positions: (B, S)
            lengths: (B, S or 1)
            return: (B, S, 1, D/2) complex64, or (B, S, 1, D/2, 2) float32
        """
        return precompute_freqs_cis(
            positions, self.head_dim, self.rope_theta, self._scaling, lengths=lengths, as_pairs=as_pairs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LlamaModel:
        if self.accelerator is not None:
            self.accelerator.reset()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie_weights()  # torch may have made a new parameter for each of the two names
        return self


def _sequence_lengths(positions: Tensor, write: CacheWrite | None, seq_lens: Sequence[int] | None) -> Tensor:
    """How long the sequence of each position is, padding left out: (1, S), or (B, 1)."""
    if seq_lens is not None:
        return torch.cat([positions.new_full((length,), length) for length in seq_lens])[None]
    if write is None:
        return positions[:, -1:] + 1
    return (write.starts + (write.width if write.counts is None else write.counts))[:, None]


def _compute_dtype(embeds: Tensor) -> torch.dtype:
    """The dtype that the projections will give."""
    device = embeds.device.type
    is_enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on meta
    return torch.get_autocast_dtype(device) if is_enabled else embeds.dtype


def last_positions(lengths: Sequence[int] | Tensor | None) -> Tensor | slice:
    """Each row's last real column, as ``output_positions``.

    Args:
        lengths: Real columns of each row; None: all are.
    Shape:
        lengths: (B,)
        return: (B,), or a slice
    """
    if lengths is None:
        return slice(-1, None)
    return (lengths if isinstance(lengths, Tensor) else torch.tensor(lengths, device="cpu")) - 1


def select_positions(hidden: Tensor, output_positions: Tensor | slice | None) -> Tensor:
    """The positions whose logits are needed.

    Args:
        hidden: What the layers gave.
        output_positions: As in ``LlamaModel.hidden_states``.
    Shape:
        hidden: (B, S, D)
        return: (B, R, D)
    """
    if output_positions is None:
        return hidden
    if isinstance(output_positions, slice):
        return hidden[:, output_positions]
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    columns = to_device(output_positions, hidden.device)
    return hidden[rows[:, None], columns[:, None] if columns.ndim == 1 else columns]
