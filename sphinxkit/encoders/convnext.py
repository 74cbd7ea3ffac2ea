"""CLIP's ConvNeXt-XXLarge, with timm's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo, check_depth, check_divisible, check_positive, register
from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.formats.convnext import CONVNEXT_FORMATS
from sphinxkit.encoders.layers import activation_layer, count_layers, init_weights
from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures

# Stem 4x4/4 and three 2x2/2 downsamplings. Source: ConvNeXt, arXiv:2201.03545, section 2.2.
_STRIDE = 32
# Layer scale before training. Source: ConvNeXt, arXiv:2201.03545, appendix A.1.
_LAYER_SCALE = 1e-6

# Where the weights of the published sizes are: (dims, depths). The other CLIP ConvNeXts have norm_eps 1e-6.
_PUBLISHED: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((384, 768, 1536, 3072), (3, 4, 30, 3)): "hf://laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
    ((192, 384, 768, 1536), (3, 3, 27, 3)): "hf://laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    ((128, 256, 512, 1024), (3, 3, 27, 3)): "hf://laion/CLIP-convnext_base_w-laion2B-s13B-b82K-augreg",
}


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, D, H, W)."""
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNextBlock(nn.Module):
    """Depthwise convolution, norm and feed-forward layers, scaled and added."""

    def __init__(self, dim: int, activation: Callable[[], nn.Module], norm_eps: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": activation(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.gamma = nn.Parameter(torch.full((dim,), _LAYER_SCALE))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape: hidden, return: (B, D, H, W)."""
        out: Tensor = self.mlp(self.norm(self.conv_dw(hidden).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return out * self.gamma.reshape(1, -1, 1, 1) + hidden


class _ConvNextTrunk(nn.Sequential):
    """The network: (B, 3, S, S) -> (B, D, S / 32, S / 32), the last map normalised."""

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], activation: Callable[[], nn.Module], norm_eps: float
    ) -> None:
        stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4), _ChannelNorm(dims[0], eps=norm_eps))
        stages = []
        for before, dim, depth in zip((None, *dims), dims, depths, strict=False):
            down: nn.Module = nn.Identity()
            if before is not None:
                conv = nn.Conv2d(before, dim, kernel_size=2, stride=2)
                down = nn.Sequential(_ChannelNorm(before, eps=norm_eps), conv)
            blocks = nn.Sequential(*[_ConvNextBlock(dim, activation, norm_eps) for _ in range(depth)])
            stages.append(nn.Sequential(OrderedDict(downsample=down, blocks=blocks)))
        head = nn.Sequential(OrderedDict(norm=_ChannelNorm(dims[-1], eps=norm_eps)))
        super().__init__(OrderedDict(stem=stem, stages=nn.Sequential(*stages), head=head))
        init_weights(self, (nn.Conv2d, nn.Linear))


class ConvNextEncoder(Encoder):
    """The last feature map of a ConvNeXt, normalised over its channels and not pooled; its mean is the prefix token.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, 1, D), patches (B, H*W, D), H = W = input_size / 32
    Source: ConvNeXt, arXiv:2201.03545; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT, *CONVNEXT_FORMATS)
    takes_activation: ClassVar[bool] = True

    def unseen_options(self) -> Mapping[str, Any]:
        """As :meth:`Encoder.unseen_options`."""
        trunk: Any = self.trunk
        return {"norm_eps": trunk.head.norm.eps}

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """As :meth:`Encoder.sizes`."""
        stages = [f"trunk.stages.{stage}.blocks." for stage in range(4)]
        return {
            "dims": [shapes[f"{stage}0.conv_dw.weight"][0] for stage in stages],
            "depths": [count_layers(shapes, f"{stage}{{}}.") for stage in stages],
        }

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels. Shape: as the class."""
        patches = rearrange(self.trunk(pixels), "b d h w -> b (h w) d")
        return VisionFeatures(prefix=patches.mean(dim=1, keepdim=True), patches=patches, grid=self.grid_size)


@register("convnext_xxlarge")
def convnext_xxlarge(
    input_size: int = 256,
    dims: Sequence[int] = (384, 768, 1536, 3072),
    depths: Sequence[int] = (3, 4, 30, 3),
    norm_eps: float = 1e-5,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu",
    trainable: bool = False,
) -> ConvNextEncoder:
    """ConvNeXt-XXLarge of LAION's CLIP, or with other options another CLIP ConvNeXt; random weights.

    Views of another size are resized to ``input_size`` by nearest neighbour (224 -> 256 in SPHINX).

    Args:
        input_size: Side of the input in pixels, a multiple of 32.
        dims: Width of each of the four stages; the last is the feature width.
        depths: Blocks of each of the four stages.
        norm_eps: Epsilon of every LayerNorm, the stem's, the downsamplings' and the last one included.
        activation: "gelu" (exact erf), "gelu_tanh" or "quick_gelu".
        trainable: Normal module instead of frozen.
    Raises:
        ShapeError: ``input_size`` is no multiple of 32, or there are not four stages.
        RegistryError: Unknown activation.
    Source: open_clip, model_configs/convnext_xxlarge.json; timm's convnext_xxlarge (norm_eps 1e-5).
    """
    name = "convnext_xxlarge"
    check_divisible(name, "input_size", input_size, "stride", _STRIDE)
    check_depth(name, *depths)
    if len(dims) != 4 or len(depths) != 4:
        raise ShapeError(f"{name}: expected four dims and four depths, got dims {tuple(dims)}, depths {tuple(depths)}")
    check_positive(name, dims=min(dims))
    trunk = _ConvNextTrunk(dims, depths, activation_layer(activation, name), norm_eps)
    side = input_size // _STRIDE
    return ConvNextEncoder(
        trunk,
        name=name,
        embed_dim=dims[-1],
        num_prefix_tokens=1,
        grid_size=(side, side),
        info=EncoderInfo(
            input_size=input_size,
            resize_mode="nearest",
            activation=activation,
            source="ConvNeXt, arXiv:2201.03545; OpenCLIP scaling laws, arXiv:2212.07143; timm's ConvNeXt",
            license="MIT",
            weights=_PUBLISHED.get((tuple(dims), tuple(depths)), ""),
        ),
        trainable=trainable,
    )
