"""Arithmetic of a step, counted: what the model needs, without what checkpointing computes again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sphinxkit.llama import LlamaModel
from sphinxkit.sphinx_model import SphinxModel

# Dense bfloat16 FLOP/s of one device. Source: NVIDIA's data sheets of the H200, H100 (SXM), A100 and L40S.
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of a device as its maker states them, or None where that is not known.

    Args:
        device: That computes.
        dtype: "bfloat16" or "float32".
    """
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in BF16_PEAK.items() if known in name), None)


def llm_flops(llm: LlamaModel, lengths: Sequence[int], num_learnt: int, *, is_trained: bool = True) -> float:
    """FLOPs of the forward and backward pass of a language model over some samples; a multiply-add is two.

    Args:
        llm: Whose sizes count.
        lengths: Positions of each sample, image slots included.
        num_learnt: Positions whose logits are computed.
        is_trained: Weights have gradients; else only their inputs do.
    """
    head = llm.head_dim
    projections = llm.embed_dim * head * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    per_token = 2 * llm.num_layers * (projections + 3 * llm.embed_dim * llm.hidden_dim)
    attention = 2 * llm.num_layers * llm.num_heads * head  # q k^T and its product with v, half of it causal
    forward = sum(per_token * length + attention * length * length for length in lengths)
    forward += 2 * llm.embed_dim * llm.vocab_size * num_learnt
    return float(forward * (3 if is_trained else 2))


def vision_flops(model: SphinxModel) -> float:
    """FLOPs of turning one image into tokens, forward only; found by following the operators without computing them.

    Args:
        model: Before its weights are sharded.
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
    """Share of the devices' peak that was used, or None where the peak is not known."""
    return None if peak is None or not seconds > 0 or not math.isfinite(flops) else flops / seconds / peak / num_devices
