"""Faster text generation: joint projections, torch.compile, quantised weights, and kernels for CPUs.

The language model depends only on the protocol ``llama.Accelerator``.
"""

from __future__ import annotations

from sphinxkit.acceleration.accelerator import FusedAccelerator
from sphinxkit.acceleration.compiled import CompiledAccelerator
from sphinxkit.acceleration.cpu.attention import BlockedAttention
from sphinxkit.acceleration.modes import accelerate
from sphinxkit.acceleration.quantization import QuantizedLinear, quantize

__all__ = ["BlockedAttention", "CompiledAccelerator", "FusedAccelerator", "QuantizedLinear", "accelerate", "quantize"]
