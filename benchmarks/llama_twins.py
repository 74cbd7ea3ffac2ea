"""LLaMA models of benchmark sizes, and Hugging Face transformers' model on the very same weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Context, build_random, nbytes
from sphinxkit.acceleration import CompiledAccelerator, FusedAccelerator
from sphinxkit.llama import LlamaModel

# The 220 M model is the one that the project's first measurements were made with.
SIZES: dict[str, dict[str, Any]] = {
    "llama_220m": {"embed_dim": 1024, "num_layers": 12, "num_heads": 16, "hidden_dim": 2816},
    "llama_84m": {"embed_dim": 1024, "num_layers": 4, "num_heads": 16, "hidden_dim": 2816},  # quick runs
    "tinyllama_1b": {"embed_dim": 2048, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4, "hidden_dim": 5632},
    "llama2_13b": {"embed_dim": 5120, "num_layers": 40, "num_heads": 40, "hidden_dim": 13824},
    "micro": {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 64},
}
VOCAB_SIZE = {"micro": 64}
COMPILED = ("tinyllama_1b",)  # graphs of 40 layers take the compiler minutes, which a lent GPU does not have


def cache_argument(twin: Any, cache: Any) -> dict[str, Any]:
    """A cache for transformers' model, under the name that its release has for it."""
    names = inspect.signature(type(twin).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def build(size: str, context: Context, dtype: torch.dtype, **options: Any) -> LlamaModel:
    """A model of one of ``SIZES`` with random weights."""
    numbers = {"vocab_size": VOCAB_SIZE.get(size, 32000), **SIZES[size], **options}
    return build_random(lambda: LlamaModel(**numbers), context.device, dtype)


def plain_twin(model: LlamaModel) -> LlamaModel:
    """The same model on the same weights, going through its modules one by one even where ``model`` is accelerated."""
    numbers = {name: getattr(model, name) for name in ("vocab_size", "embed_dim", "num_layers", "num_heads")}
    numbers |= {name: getattr(model, name) for name in ("num_kv_heads", "hidden_dim", "max_seq_len")}
    with torch.device("meta"):
        twin = LlamaModel(**numbers)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def compiled(model: LlamaModel, context: Context) -> LlamaModel:
    """A copy whose prefill and decoding are compiled; a micro run only traces."""
    twin = accelerated(model)
    twin.accelerator = CompiledAccelerator("eager" if context.micro else "inductor")
    return twin


def accelerated(model: LlamaModel, *, use_gemv: bool = True) -> LlamaModel:
    """A copy that generates text through fused layers; what is joined exists twice."""
    twin = plain_twin(model)
    for parameter in twin.parameters():  # memory that is shared is not joined
        parameter.data = parameter.data.clone()
    twin.accelerator = FusedAccelerator(use_gemv=use_gemv)
    return twin


def accelerated_and_plain(model: LlamaModel) -> tuple[LlamaModel, LlamaModel]:
    """The model prepared for inference, and the one that its rivals are made from.

    On a CPU these hold the weights twice, as joining moves them to large pages, which would serve the rivals, too. On
    CUDA the rivals share the joint weights.
    """
    if model.norm.weight.device.type == "cpu":
        return accelerated(model), model
    model.accelerator = fused = FusedAccelerator()
    fused.prepare(model)
    return model, plain_twin(model)


def weight_bytes(model: LlamaModel) -> int:
    """Bytes of the weights that one decoding step must read: all but the embedding table."""
    return nbytes(model) - nbytes(model.embed_tokens)


def num_weights(model: LlamaModel) -> int:
    """Weights that every token is multiplied with, the output matrix left out."""
    return sum(parameter.numel() for parameter in model.layers.parameters() if parameter.ndim == 2)


def attention_flops(model: LlamaModel, queries: int, keys_before: int = 0) -> int:
    """FLOPs of causal attention of one row, all layers: two products over the keys that each query sees."""
    seen = queries * keys_before + queries * (queries + 1) // 2
    return 4 * model.num_layers * model.num_heads * model.head_dim * seen


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection from interleaved rotary pairs to Hugging Face's two halves."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def transformers_twin(model: LlamaModel) -> Any:
    """``LlamaForCausalLM`` that shares every weight but q and k, which are reordered copies."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=model.hidden_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_eps,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    ours = model.state_dict()
    weights = {
        "model.embed_tokens.weight": ours["embed_tokens.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for index in range(model.num_layers):
        source, target = f"layers.{index}.", f"model.layers.{index}."
        for name, heads in (("q", model.num_heads), ("k", model.num_kv_heads)):
            weights[f"{target}self_attn.{name}_proj.weight"] = _half_split(
                ours[f"{source}attention.{name}_proj.weight"], heads
            )
        for name in ("v", "o"):
            weights[f"{target}self_attn.{name}_proj.weight"] = ours[f"{source}attention.{name}_proj.weight"]
        for name in ("gate", "up", "down"):
            weights[f"{target}mlp.{name}_proj.weight"] = ours[f"{source}mlp.{name}_proj.weight"]
        weights[f"{target}input_layernorm.weight"] = ours[f"{source}attention_norm.weight"]
        weights[f"{target}post_attention_layernorm.weight"] = ours[f"{source}mlp_norm.weight"]
    twin.load_state_dict(weights, assign=True)
    twin.model.rotary_emb = LlamaRotaryEmbedding(config).to(ours["norm.weight"].device)
    return twin.eval()


def public_loop(model: LlamaModel, batch: int, capacity: int) -> Callable[[Tensor, int], Tensor]:
    """A step written the way LLaMA2-Accessory's eager loop works, on the model's weights: (tokens, start) -> logits.

    Preallocated caches are sliced, keys and values repeated over their group, freqs_cis multiplied as complex numbers,
    one operator at a time.
    """
    weight = model.norm.weight
    heads, groups, width = model.num_heads, model.num_kv_heads, model.head_dim
    shape = (model.num_layers, batch, capacity, groups, width)
    keys, values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
    frequencies = model.rope_theta ** -(torch.arange(0, width, 2, device=weight.device).float() / width)
    angles = torch.outer(torch.arange(2 * model.max_seq_len, device=weight.device).float(), frequencies)
    table = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + model.norm_eps)).type_as(x) * scale

    def rotate(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(-2).type_as(x)

    def step(tokens: Tensor, start: int) -> Tensor:
        hidden = model.embed_tokens(tokens)
        count = tokens.shape[1]
        turns = table[start : start + count]
        for index, layer in enumerate(model.layers):
            attention, mlp = layer.attention, layer.mlp
            x = norm(hidden, layer.attention_norm.weight)
            q = rotate(attention.q_proj(x).view(batch, count, heads, width), turns)
            keys[index, :, start : start + count] = rotate(attention.k_proj(x).view(batch, count, groups, width), turns)
            values[index, :, start : start + count] = attention.v_proj(x).view(batch, count, groups, width)
            k, v = (
                cache[index, :, : start + count, :, None].expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)
                for cache in (keys, values)
            )
            out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=count > 1)
            hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = norm(hidden, layer.mlp_norm.weight)
            hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return model.lm_head(norm(hidden, model.norm.weight)[:, -1:]).float()

    return step


Step = Callable[[Tensor], Tensor]


def our_step(
    model: Any, batch: int, prompt: int, new: int, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Our step for ``batch`` rows, (B, S) -> logits (B, 1, V): a prompt starts, one token continues."""
    cache = model.make_cache(batch, prompt + new, dtype=dtype)

    def step(tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 1:
            return model.decode(tokens, cache)
        cache.reset()
        return model.prefill(model.embed(tokens), cache)

    return step


def public_step(model: Any, batch: int, prompt: int, new: int) -> Callable[[Tensor], Tensor]:
    """As ``our_step``, through ``public_loop``."""
    forward = public_loop(model, batch, prompt + new)
    position = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal position
        start = 0 if tokens.shape[1] > 1 else position
        position = start + tokens.shape[1]
        return forward(tokens, start)

    return step


def transformers_step(twin: Any, batch: int, prompt: int, new: int, static: bool) -> Callable[[Tensor], Tensor]:
    """As ``our_step``, by transformers' model and cache."""
    from transformers import DynamicCache, StaticCache

    cache: Any = StaticCache(config=twin.config, max_cache_len=prompt + new) if static else None
    position = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal cache, position
        if tokens.shape[1] > 1:
            position = 0
            if static:
                cache.reset()
            else:
                cache = DynamicCache(config=twin.config)
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
        position += tokens.shape[1]
        given = cache_argument(twin, cache)
        return twin(input_ids=tokens, position_ids=positions, use_cache=True, logits_to_keep=1, **given).logits

    return step


def generate_padded(
    twin: Any, prompts: Sequence[list[int]], answer_lengths: Sequence[int], order: Sequence[int], batch: int, pad: int
) -> list[Tensor]:
    """``generate`` on batches padded on the left, each as long as its longest answer; surplus tokens are cut off."""
    answers: dict[int, Tensor] = {}
    device = twin.lm_head.weight.device
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = max(len(prompts[row]) for row in part)
        ids = torch.tensor([[pad] * (longest - len(prompts[row])) + prompts[row] for row in part], device=device)
        real = torch.tensor(
            [[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in part], device=device
        )
        out = twin.generate(
            ids,
            attention_mask=real,
            max_new_tokens=max(answer_lengths[row] for row in part),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad,
        ).cpu()
        for index, row in enumerate(part):
            answers[row] = out[index, longest : longest + answer_lengths[row]]
    return [answers[row] for row in range(len(prompts))]
