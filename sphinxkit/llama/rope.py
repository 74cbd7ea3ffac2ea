"""Rotary positions in the interleaved layout of Meta's LLaMA, and how they are stretched to longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.registry import from_fields

ROPE_TYPES = ("dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary positions reach beyond the length that a model was pretrained with.

    Linear scaling is not one of them: it is a plain number, the factor on the positions.

    Args:
        type: "dynamic": the base grows with the sequence, from the pretrained length on. "llama3": long wavelengths
            are stretched, short ones are kept, with a ramp between. "yarn": the same with a ramp over the channels, and
            queries and keys are scaled.
        factor: How many times as long the context becomes.
        original_max_seq_len: The pretrained length.
        low_freq_factor: llama3: wavelengths above ``original_max_seq_len / low_freq_factor`` are stretched whole.
        high_freq_factor: llama3: wavelengths below ``original_max_seq_len / high_freq_factor`` are kept.
        beta_fast: yarn: channels that turn more often than this within the pretrained length are kept.
        beta_slow: yarn: channels that turn less often are stretched whole.
        attention_factor: yarn: factor on queries and keys; None: ``0.1 * ln(factor) + 1``.
        truncate: yarn: whether the ramp begins and ends at whole channels.
    Raises:
        RegistryError: The type is unknown.
        ShapeError: A number is out of range.
    Source: transformers, modeling_rope_utils.py, which the checkpoints' files are written for; YaRN, arXiv:2309.00071;
        Llama 3, arXiv:2407.21783, section 3.4.2.
    """

    type: Literal["dynamic", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise RegistryError(
                f"rope_scaling: unknown type {self.type!r}; known: {', '.join(ROPE_TYPES)}, and a number for linear"
            )
        numbers = {name: getattr(self, name) for name in ("factor", "original_max_seq_len", "beta_fast", "beta_slow")}
        wrong = [f"{name} {value!r}" for name, value in numbers.items() if not _is_positive(value)]
        if wrong:
            raise ShapeError(f"rope_scaling: expected positive numbers, got {', '.join(wrong)}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ShapeError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be positive and below high_freq_factor "
                f"{self.high_freq_factor}"
            )

    @property
    def magnitude(self) -> float:
        """Factor on rotated queries and keys."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, exponents: Tensor, theta: float, lengths: Tensor) -> Tensor:
        """Radians per position of each pair of channels.

        Args:
            exponents: 0 to 1, of each pair.
            theta: Base of the wavelengths.
            lengths: Of the sequence that each position belongs to.
        Shape:
            exponents: (D/2,)
            lengths: (B, S or 1)
            return: (D/2,), or (B, S or 1, 1, D/2) where it depends on the length
        """
        dim = 2 * len(exponents)
        if self.type == "dynamic":
            grown = lengths.clamp(min=self.original_max_seq_len).to(torch.float32)[:, :, None, None]
            stretch = self.factor * grown / self.original_max_seq_len - (self.factor - 1)
            return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
        plain = 1.0 / theta**exponents
        if self.type == "llama3":
            turns = self.original_max_seq_len * plain / (2 * math.pi)  # within the pretrained length
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            low, high = (self._channel_of(turns, dim, theta) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            width = high - low if high != low else 0.001  # as transformers
            kept = 1.0 - (torch.arange(dim // 2, device=plain.device, dtype=torch.float32) - low) / width
        kept = kept.clamp(0, 1)
        return plain * kept + plain / self.factor * (1 - kept)

    def _channel_of(self, turns: float, dim: int, theta: float) -> float:
        """The pair of channels that turns so often within the pretrained length."""
        return dim * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))


Scaling = float | RopeScaling | None


def parse_rope_scaling(value: float | Mapping[str, Any] | None) -> Scaling:
    """The ``rope_scaling`` option of a model, checked.

    Args:
        value: A factor on the positions, or the fields of a ``RopeScaling``.
    Raises:
        RegistryError: The type or a key is unknown, or a key is missing.
        ShapeError: A number is out of range.
    """
    if not isinstance(value, Mapping):
        if value is not None and not _is_positive(value):
            raise ShapeError(f"rope_scaling: expected a positive factor or a mapping, got {value!r}")
        return value
    return from_fields(RopeScaling, value, "rope_scaling")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def precompute_freqs_cis(
    positions: Tensor,
    head_dim: int,
    theta: float = 10000.0,
    scaling: Scaling = None,
    *,
    lengths: Tensor | None = None,
    as_pairs: bool = False,
) -> Tensor:
    """Complex numbers that rotate each pair of channels at each position; of length 1, but for yarn.

    They are computed from the positions at every forward pass, in float32, and never stored: a model built on the meta
    device or cast to 16 bit has no table that could be garbage or rounded. A pass pays for it once, not per layer.

    Args:
        positions: Integer positions.
        head_dim: Channels of a head, D; even.
        theta: Base of the wavelengths.
        scaling: Factor on the positions (0.25 squeezes a context four times as long into the trained range), or a
            ``RopeScaling``.
        lengths: Of the sequence that each position belongs to, for dynamic scaling; None: a row's last position.
        as_pairs: Real and imaginary parts, for compilers that know no complex numbers.
    Shape:
        positions: (B, S)
        lengths: (B, S or 1)
        return: (B, S, 1, D/2) complex64; the axis of length 1 is for the heads. As pairs: (B, S, 1, D/2, 2) float32
    Source: RoFormer, arXiv:2104.09864, equation 15; linear scaling: position interpolation, arXiv:2306.15595.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32)
    magnitude = 1.0
    if isinstance(scaling, RopeScaling):
        if lengths is None:
            lengths = positions.amax(dim=1, keepdim=True) + 1
        angles = angles[:, :, None, None] * scaling.frequencies(exponents, theta, lengths)
        magnitude = scaling.magnitude
    else:
        angles = angles if scaling is None else angles * scaling
        angles = angles[:, :, None, None] * (1.0 / theta**exponents)
    if as_pairs:
        return torch.stack([angles.cos(), angles.sin()], dim=-1) * magnitude
    return torch.polar(torch.full_like(angles, magnitude), angles)


def apply_rope(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (0, 1), (2, 3), ... of every head.

    Computed in float32 and cast back. This is the interleaved layout of Meta's LLaMA. Hugging Face's layout pairs
    channel i with i + D/2, which is the same model after a permutation of the rows of q_proj and k_proj.

    Args:
        x: Queries or keys.
        freqs_cis: What ``precompute_freqs_cis`` gives.
    Shape:
        x: (B, S, H, D)
        freqs_cis: (B or 1, S, 1, D/2) complex64, or their pairs (B or 1, S, 1, D/2, 2)
        return: (B, S, H, D), dtype of ``x``
    Source: RoFormer, arXiv:2104.09864, equation 34. As complex numbers it takes one pass: at 1455 tokens of 16 heads
        on a CPU an eighth of the time of the four-product form.
    """
    if not freqs_cis.is_complex():
        return rotate_pairs(x.float(), freqs_cis).to(x.dtype)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


def rotate_pairs(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """``apply_rope`` without complex numbers: four products of real ones.

    Args:
        x: Queries or keys, float32.
        freqs_cis: What ``precompute_freqs_cis`` gives as pairs.
    Shape:
        x: (B, S, H, D)
        freqs_cis: (B or 1, S, 1, D/2, 2)
        return: (B, S, H, D)
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    cos, sin = freqs_cis.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
