"""CLIP's ConvNeXt-XXLarge, built on timm's module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from einops import rearrange
from torch import Tensor

from sphinxkit.encoders.base import Encoder, EncoderInfo, check_depth, check_divisible, register
from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.formats.convnext import CONVNEXT_FORMATS
from sphinxkit.encoders.layers import activation_layer, count_layers, replace_activations
from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures

# Stem 4x4/4 and three 2x2/2 downsamplings. Source: ConvNeXt, arXiv:2201.03545, section 2.2.
_STRIDE = 32


# Where the weights of the published sizes are: (dims, depths). The other CLIP ConvNeXts have norm_eps 1e-6.
_PUBLISHED: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((384, 768, 1536, 3072), (3, 4, 30, 3)): "hf://laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
    ((192, 384, 768, 1536), (3, 3, 27, 3)): "hf://laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    ((128, 256, 512, 1024), (3, 3, 27, 3)): "hf://laion/CLIP-convnext_base_w-laion2B-s13B-b82K-augreg",
}


class ConvNextEncoder(Encoder):
    """The last feature map of a ConvNeXt, normalised over its channels and not pooled; its mean is the prefix token.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, 1, D), patches (B, H*W, D), H = W = input_size / 32
    Source: ConvNeXt, arXiv:2201.03545; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, encode_image.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT, *CONVNEXT_FORMATS)

    def unseen_options(self) -> Mapping[str, Any]:
        """As :meth:`Encoder.unseen_options`."""
        trunk: Any = self.trunk
        return {"norm_eps": trunk.head.norm.eps}

    def set_activation(self, activation: str) -> None:
        """As :meth:`Encoder.set_activation`.

        Raises:
            RegistryError: There is none of that name.
        """
        replace_activations(self.trunk, activation, self.name)
        self.info = replace(self.info, activation=activation)

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """As :meth:`Encoder.sizes`."""
        stages = [f"trunk.stages.{stage}.blocks." for stage in range(4)]
        return {
            "dims": [shapes[f"{stage}0.conv_dw.weight"][0] for stage in stages],
            "depths": [count_layers(shapes, f"{stage}{{}}.") for stage in stages],
        }

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels.

        Shape:
            pixels: (B, 3, input_size, input_size)
            return: prefix (B, 1, D), patches (B, H*W, D)
        """
        trunk: Any = self.trunk
        patches = rearrange(trunk.head.norm(trunk.forward_features(pixels)), "b d h w -> b (h w) d")
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
    from timm.models.convnext import ConvNeXt

    name = "convnext_xxlarge"
    check_divisible(name, "input_size", input_size, "stride", _STRIDE)
    check_depth(name, *depths)
    if len(dims) != 4 or len(depths) != 4:
        raise ShapeError(f"{name}: expected four dims and four depths, got dims {tuple(dims)}, depths {tuple(depths)}")
    trunk = ConvNeXt(
        num_classes=0,
        global_pool="",
        depths=tuple(depths),
        dims=tuple(dims),
        act_layer=activation_layer(activation, name),
        norm_eps=norm_eps,
        drop_path_rate=0.0,
    )
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
