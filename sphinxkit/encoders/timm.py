"""Any timm backbone by name as an encoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo, register
from sphinxkit.encoders.formats.base import SPHINXKIT, WeightFormat
from sphinxkit.encoders.formats.timm import TIMM_FORMATS
from sphinxkit.errors import RegistryError, ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.registry import suggest

# What this module decides itself, so that no option contradicts it or makes timm touch the network.
_RESERVED = frozenset({"pretrained", "checkpoint_path", "num_classes", "global_pool", "features_only", "img_size"})


class TimmEncoder(Encoder):
    """Features of a timm backbone, before its pooling and classifier.

    The prefix of a backbone that gives a sequence (a ViT) is timm's ``num_prefix_tokens``: class, distillation and
    register tokens, or none (SigLIP). A backbone that gives a map (a CNN, Swin) has the map's cells as patches and
    their mean as a prefix of one token, as SPHINX's ConvNeXt (our choice for all maps, so that they mix with ViTs).
    timm's last norm is applied only if it comes before the pooling.

    Shape:
        pixels: (B, 3, S, S)
        return: prefix (B, P, D), patches (B, H*W, D)
    Source: timm, github.com/huggingface/pytorch-image-models, forward_features.
    """

    weight_formats: ClassVar[tuple[WeightFormat, ...]] = (SPHINXKIT, *TIMM_FORMATS)

    def encode(self, pixels: Tensor) -> VisionFeatures:
        """Run the network on prepared pixels. Shape: as the class."""
        trunk: Any = self.trunk
        hidden: Tensor = trunk.forward_features(pixels)
        if hidden.ndim == 4:
            patches = rearrange(hidden, "b h w d -> b (h w) d" if _is_nhwc(trunk) else "b d h w -> b (h w) d")
            return VisionFeatures(prefix=patches.mean(dim=1, keepdim=True), patches=patches, grid=self.grid_size)
        prefix, patches = hidden[:, : self.num_prefix_tokens], hidden[:, self.num_prefix_tokens :]
        return VisionFeatures(prefix=prefix, patches=patches, grid=self.grid_size)


class _ForwardFeatures(nn.Module):
    """``forward`` is the trunk's ``forward_features``, for ``functional_call``."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Any:
        """Shape: pixels: (B, 3, S, S)."""
        trunk: Any = self.trunk
        return trunk.forward_features(pixels)


def _is_nhwc(trunk: Any) -> bool:
    return str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")


def _facts(trunk: Any, where: str, input_size: int) -> tuple[int, int, tuple[int, int]]:
    """(embed_dim, num_prefix_tokens, grid) from a pass of the network on meta tensors: nothing is computed."""
    probe = _ForwardFeatures(trunk).eval()
    state = {name: tensor.to("meta") for name, tensor in [*probe.named_parameters(), *probe.named_buffers()]}
    dtype = next(trunk.parameters()).dtype
    pixels = torch.zeros(1, 3, input_size, input_size, dtype=dtype, device="meta")
    try:
        with torch.no_grad():
            features = torch.func.functional_call(probe, state, (pixels,))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ShapeError(f"{where}: the backbone does not take input_size {input_size}: {error}") from error
    if isinstance(features, Tensor) and features.ndim == 4:
        _, height, width, dim = features.shape if _is_nhwc(trunk) else features.permute(0, 2, 3, 1).shape
        return dim, 1, (height, width)
    if not isinstance(features, Tensor) or features.ndim != 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ShapeError(f"{where}: expected features (B, N, D) or (B, D, H, W) from the backbone, got {shape}")
    num_prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0))
    num_patches = features.shape[1] - num_prefix_tokens
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ShapeError(
            f"{where}: {features.shape[1]} tokens less {num_prefix_tokens} prefix tokens are no square grid"
        )
    return features.shape[2], num_prefix_tokens, (side, side)


def _published(facts: Any) -> str:
    """Where timm has the weights of this name and tag, as far as that is the hub."""
    repository, file = facts.get("hf_hub_id"), facts.get("hf_hub_filename")
    return "/".join(["hf:/", *filter(None, (repository, file))]) if repository else ""


@register("timm")
def timm(model: str, input_size: int | None = None, trainable: bool = False, **options: Any) -> TimmEncoder:
    """Any timm backbone with random weights, without its pooling and classifier.

    Widths, grid and prefix tokens are read from the built network. Pixel statistics are those of timm's pretrained
    configuration of that name. A backbone with non-persistent buffers (Swin, rotary positions) that is built on the
    meta device needs timm's own initialisation of them after ``to_empty``.

    Args:
        model: timm's name, with or without a weights tag; ``timm.list_models()`` lists them.
        input_size: Side of the input in pixels; None: timm's for this name.
        trainable: Normal module instead of frozen.
        **options: More keyword arguments of the timm model (``embed_dim``, ``depth``, ``drop_path_rate``, ...).
    Raises:
        RegistryError: timm has no such model or option, or the option is decided here.
        ShapeError: The pooling cannot be removed, the backbone does not take ``input_size``, or its features form no
            square grid.
    Source: timm, github.com/huggingface/pytorch-image-models.
    """
    from timm import create_model, is_model, list_models
    from timm.models import get_pretrained_cfg

    where = f"timm {model!r}"
    if ":" in model or not is_model(model):
        hint = suggest(model, list_models())
        raise RegistryError(f"{where}: timm has no such model{hint} (hub ids are given as weights=)")
    reserved = sorted(_RESERVED.intersection(options))
    if reserved:
        raise RegistryError(f"{where}: {', '.join(reserved)} cannot be set: sphinxkit decides it (see input_size)")
    try:
        config = get_pretrained_cfg(model)
    except RuntimeError as error:  # a tag that timm does not have
        raise RegistryError(f"{where}: {error}") from error
    if input_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = input_size
    try:
        trunk = create_model(model, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise RegistryError(f"{where}: timm refuses the options: {error}") from error
    try:
        trunk.reset_classifier(0, "")
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:  # what timm's classes raise here
        raise ShapeError(f"{where}: timm cannot remove the pooling of this backbone: {error}") from error
    facts = trunk.pretrained_cfg
    if input_size is None:
        input_size = int(facts["input_size"][-1])
    embed_dim, num_prefix_tokens, grid_size = _facts(trunk, where, input_size)
    red, green, blue = (float(value) for value in facts["mean"])
    red_std, green_std, blue_std = (float(value) for value in facts["std"])
    return TimmEncoder(
        trunk,
        name=f"timm/{model}",
        embed_dim=embed_dim,
        num_prefix_tokens=num_prefix_tokens,
        grid_size=grid_size,
        info=EncoderInfo(
            mean=(red, green, blue),
            std=(red_std, green_std, blue_std),
            input_size=input_size,
            resize_mode="bicubic",
            activation="",
            source=f"timm {model}, github.com/huggingface/pytorch-image-models",
            license=str(facts.get("license") or ""),
            weights=_published(facts),
        ),
        trainable=trainable,
    )
