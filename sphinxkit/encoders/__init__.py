"""Vision encoders: CLIP, ConvNeXt, DINOv2, BLIP-2's Q-Former, any timm backbone, and custom encoders."""

from __future__ import annotations

from sphinxkit.encoders.base import Encoder, EncoderInfo, names, register, registry
from sphinxkit.encoders.check import check_encoder
from sphinxkit.encoders.clip import ClipEncoder, clip_vit_large_patch14
from sphinxkit.encoders.convnext import ConvNextEncoder, convnext_xxlarge
from sphinxkit.encoders.dinov2 import Dinov2Encoder, dinov2_vit_giant_patch14
from sphinxkit.encoders.qformer import QFormerEncoder, blip2_qformer
from sphinxkit.encoders.timm import TimmEncoder, timm
from sphinxkit.encoders.weights import (
    PRETRAINED,
    LoadedWeights,
    PublishedWeights,
    create,
    load_weights,
    open_weights,
    published_source,
    wanted_names,
)

__all__ = [
    "PRETRAINED",
    "ClipEncoder",
    "ConvNextEncoder",
    "Dinov2Encoder",
    "Encoder",
    "EncoderInfo",
    "LoadedWeights",
    "PublishedWeights",
    "QFormerEncoder",
    "TimmEncoder",
    "blip2_qformer",
    "check_encoder",
    "clip_vit_large_patch14",
    "convnext_xxlarge",
    "create",
    "dinov2_vit_giant_patch14",
    "load_weights",
    "names",
    "open_weights",
    "published_source",
    "register",
    "registry",
    "timm",
    "wanted_names",
]
