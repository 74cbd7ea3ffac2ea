"""The base class of all vision encoders, the facts about their input, and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.layers import replace_activations
from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, check_normalized, check_pixels, renormalize, resize_pixels
from sphinxkit.registry import Registry

MAX_LAYERS = 256  # our choice


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Facts about an encoder's input and origin, as data.

    Args:
        mean: Per-channel pixel mean the network was trained with, on the [0, 1] scale.
        std: Per-channel pixel standard deviation it was trained with.
        input_size: Side in pixels of the square that the network sees.
        resize_mode: How pixels of another size are resized to ``input_size``.
        activation: Activation inside the feed-forward layers.
        source: Paper and code of the architecture.
        license: Licence of the published weights ("" if unknown).
        weights: Where the published weights are, as ``load_weights`` takes it ("" if nowhere).
    """

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    input_size: int = 224
    resize_mode: Literal["bicubic", "nearest"] = "bicubic"
    activation: str = "gelu"
    source: str = ""
    license: str = ""
    weights: str = ""


class Encoder(nn.Module):
    """A vision backbone behind one interface: CLIP-normalised pixels in, ``VisionFeatures`` out.

    A subclass builds its network, passes it to this constructor and implements ``encode``. This class resizes,
    renormalises, casts and freezes. A frozen encoder (the default) has parameters without gradients, stays in eval mode
    when ``train()`` is called on the model around it, and records no autograd graph.

    Args:
        trunk: The network; its parameters are named ``trunk.*``.
        name: Name for messages, usually the registered one.
        embed_dim: Width D of the features.
        num_prefix_tokens: Tokens P without a place in the image, first in the sequence.
        grid_size: (H, W) of the patches; (0, 0) without patches.
        info: Input facts.
        trainable: A normal module, with gradients and ``train()``.
    Attributes:
        input_size: Side in pixels of the square that the network sees.
        dtype: Dtype of the parameters, and so of the features.
        weight_formats: Formats of published weights that ``load_weights`` knows for it, in the order they are tried.
        position_table: Name of the parameter that holds learnt positions, a class token's first; "" if none does.
        takes_activation: Whether :meth:`set_activation` may change it.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT,)
    position_table: ClassVar[str] = ""
    takes_activation: ClassVar[bool] = False

    def __init__(
        self,
        trunk: nn.Module,
        *,
        name: str,
        embed_dim: int,
        num_prefix_tokens: int,
        grid_size: tuple[int, int],
        info: EncoderInfo,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.name = name
        self.embed_dim = embed_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_size = grid_size
        self.info = info
        self.trainable = trainable
        if not trainable:
            self.requires_grad_(False)
        self.train(trainable)

    @property
    def input_size(self) -> int:
        """Side in pixels of the square that the network sees."""
        return self.info.input_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def train(self, mode: bool = True) -> Encoder:
        """Set training mode; a frozen encoder stays in eval mode."""
        super().train(mode and self.trainable)
        return self

    def prepare(self, pixels: Tensor) -> Tensor:
        """Bring pixels to the size, statistics and dtype that the network takes.

        Pixels of another size are resized through float16 (see ``sphinxkit.pixels.resize_pixels``); pixels of the
        right size are not changed. Statistics change in float32 or wider.

        Args:
            pixels: CLIP-normalised, floating, any S.
        Shape:
            pixels: (B, 3, S, S)
            return: (B, 3, input_size, input_size), in ``dtype``
        Raises:
            ShapeError: Not floating (B, 3, S, S) pixels.
            DataError: No tensor, or values that are not CLIP-normalised (checked on a CPU).
        """
        where = f"encoder {self.name}"
        check_pixels(pixels, where)
        check_normalized(pixels, where)
        height, width = pixels.shape[2:]
        if height != width:
            raise ShapeError(
                f"encoder {self.name}: expected square pixels (B, 3, S, S), got {tuple(pixels.shape)}: pad or tile them"
            )
        if height != self.input_size:
            pixels = resize_pixels(pixels, (self.input_size, self.input_size), self.info.resize_mode)
        if (self.info.mean, self.info.std) != (CLIP_MEAN, CLIP_STD):
            wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
            pixels = renormalize(wide, self.info.mean, self.info.std)
        return pixels.to(self.dtype)

    def resample_positions(self, positions: Tensor, grid: int) -> Tensor:
        """Bring weights' position table to another grid, by the rule that the family was published with.

        Args:
            positions: Class token's position first, then the patches' row-major.
            grid: Side of the target grid in patches.
        Shape:
            positions: (1, 1 + n*n, D)
            return: (1, 1 + grid*grid, D)
        Raises:
            ShapeError: The family has no such rule.
        """
        raise ShapeError(f"encoder {self.name}: its position table cannot be resampled")

    def unseen_options(self) -> Mapping[str, Any]:
        """Builder options that do not follow from tensor shapes, as weight files may state them."""
        return {}

    def set_activation(self, activation: str) -> None:
        """Set the activation of the feed-forward layers to that of the weights.

        Raises:
            ShapeError: The network has another one that cannot be changed.
            RegistryError: There is none of that name.
        """
        if self.takes_activation:
            replace_activations(self.trunk, activation, self.name)
            self.info = replace(self.info, activation=activation)
        elif activation != self.info.activation:
            raise ShapeError(
                f"encoder {self.name}: the weights are for activation {activation!r}, the network has "
                f"{self.info.activation!r}"
            )

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Infer the builder's options from tensor names and shapes, for error messages.

        Args:
            shapes: Shapes by the encoder's own names.
        """
        return {}

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on pixels that ``prepare`` made; a subclass implements it.

        Args:
            pixels: Renormalised, in ``dtype``.

        Shape:
            pixels: (B, 3, input_size, input_size)
            return: prefix (B, P, D), patches (B, H*W, D)
        Raises:
            NotImplementedError: The subclass does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement encode(pixels) -> VisionFeatures")

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """Encode a batch of square views.

        Args:
            pixels: CLIP-normalised, floating, any S.
        Shape:
            pixels: (B, 3, S, S)
            return: prefix (B, P, D), patches (B, H*W, D), in the parameters' dtype
        Raises:
            ShapeError: Not floating (B, 3, S, S) pixels.
            DataError: No tensor, or values that are not CLIP-normalised (checked on a CPU).
        """
        if self.trainable:
            return self.encode(self.prepare(pixels))
        with torch.no_grad():
            return self.encode(self.prepare(pixels))

    def extra_repr(self) -> str:
        """Facts shown by ``print(encoder)``."""
        return (
            f"{self.name}, embed_dim={self.embed_dim}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"grid_size={self.grid_size}, input_size={self.input_size}, trainable={self.trainable}"
        )


def check_divisible(where: str, what: str, value: int, by_what: str, by: int) -> None:
    """Raise unless both are positive ints and ``by`` divides ``value``.

    Args:
        where: Name of the caller, for the message.
        what: Name of ``value``.
        value: The multiple.
        by_what: Name of ``by``.
        by: The divisor.
    Raises:
        ShapeError: It does not; the message names both.
    """
    if not (isinstance(value, int) and isinstance(by, int)) or by < 1 or value < 1 or value % by:
        raise ShapeError(f"{where}: {what} {value} is not a positive multiple of {by_what} {by}")


def check_positive(where: str, **sizes: float) -> None:
    """Raise unless every size is positive.

    Args:
        where: Name of the caller, for the message.
        sizes: By name.
    Raises:
        ShapeError: One is not; the message names it.
    """
    for what, size in sizes.items():
        if not size > 0:
            raise ShapeError(f"{where}: {what} must be positive, got {size}")


registry: Registry[Encoder] = Registry("encoder")
register = registry.register
names = registry.names


def check_depth(where: str, *num_layers: int) -> None:
    """Raise unless a network has as many layers as one may have: each costs time to make, even without memory.

    Args:
        where: Name of the caller, for the message.
        num_layers: Of each stack of layers.
    Raises:
        ShapeError: A number is negative, or they are more than ``MAX_LAYERS`` together.
    """
    if min(num_layers, default=0) < 0:
        raise ShapeError(f"{where}: expected at least 0 layers, got {min(num_layers)}")
    if sum(num_layers) > MAX_LAYERS:
        raise ShapeError(f"{where}: {sum(num_layers)} layers, but {MAX_LAYERS} are the most")
