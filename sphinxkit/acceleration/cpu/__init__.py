"""CPU acceleration: a kernel for a few rows, attention in blocks, memory in large pages."""

from __future__ import annotations

from sphinxkit.acceleration.cpu.attention import BlockedAttention
from sphinxkit.acceleration.cpu.gemv import Gemv
from sphinxkit.acceleration.cpu.host_memory import keep_freed_memory
from sphinxkit.acceleration.cpu.probe import find_gemv

__all__ = ["BlockedAttention", "Gemv", "find_gemv", "keep_freed_memory"]
