"""Counts a step's FLOPs, without the recomputation of activation checkpointing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sphinxkit.llama import LlamaModel
from sphinxkit.sphinx_model import SphinxModel

# Dense bfloat16 FLOP/s of one device. Source: NVIDIA's data sheets of the H200, H100 (SXM), A100 and L40S.
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of a device as its maker states it; None if unknown.

    Args:
        device: The device.
        dtype: "bfloat16" or "float32".
    """
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in BF16_PEAK.items() if known in name), None)


def llm_flops(llm: LlamaModel, lengths: Sequence[int], num_learnt: int, *, is_trained: bool = True) -> float:
    """FLOPs of a language model's forward and backward pass over some samples; a multiply-add counts as two.

    Args:
        llm: The language model.
        lengths: Positions of each sample, image tokens included.
        num_learnt: Number of positions whose logits are computed.
        is_trained: Whether weights have gradients; if not, only their inputs do.
    """
    head = llm.head_dim
    projections = llm.embed_dim * head * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    feed_forward = 3 * llm.embed_dim * llm.hidden_dim
    if llm.moe is not None:
        feed_forward = llm.moe.num_experts_per_tok * feed_forward + llm.moe.num_experts * llm.embed_dim
    per_token = 2 * llm.num_layers * (projections + feed_forward)
    attention = 2 * llm.num_layers * llm.num_heads * head  # q k^T and its product with v, half of it causal
    forward = sum(per_token * length + attention * length * length for length in lengths)
    forward += 2 * llm.embed_dim * llm.vocab_size * num_learnt
    return float(forward * (3 if is_trained else 2))


def vision_flops(model: SphinxModel) -> float:
    """FLOPs of encoding one image, forward only; operators are traced, not run.

    Args:
        model: The model before sharding.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    vision = model.vision
    if vision is None:
        return 0.0
    size = vision.image_size
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in (*vision.named_parameters(), *vision.named_buffers())
        }
        torch.func.functional_call(vision, state, (torch.empty(1, 3, size, size),))
    return float(counter.get_total_flops())


def utilization(flops: float, seconds: float, peak: float | None, num_devices: int = 1) -> float | None:
    """Fraction of the devices' peak FLOP/s that was used; None if the peak is unknown."""
    return None if peak is None or not seconds > 0 or not math.isfinite(flops) else flops / seconds / peak / num_devices
