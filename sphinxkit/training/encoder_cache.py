"""Disk cache of frozen encoders' features, keyed by pixel content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sphinxkit.encoders.base import Encoder
from sphinxkit.features import VisionFeatures
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.feature_shards import KEY_BYTES, FeatureShards
from sphinxkit.training.network_digest import network_digest, tensor_digest


def _precision(device: str) -> str:
    """What autocast makes of the encoder's products."""
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""


class FeatureCache:
    """Disk cache of ``Encoder.forward``.

    Features are found by a hash of the network (see ``network_digest``), the pixels of a view and autocast's dtype, so
    other weights, activations, dtypes or images have other features. Damaged features are computed again.

    Args:
        encoder: Frozen.
        folder: Cache folder; encoders, runs and processes may share it.
    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.encoder = encoder
        self.shards = FeatureShards(folder / f"{encoder.name}-{network_digest(encoder)}")
        self.hits, self.misses = 0, 0
        self._forward = encoder.forward

    def __call__(self, pixels: Tensor) -> VisionFeatures:
        """Features of a batch of views; only views missing on disk are computed.

        Shape:
            pixels: (B, 3, S, S)
            return: as ``Encoder.forward``
        """
        precision = _precision(pixels.device.type).encode()
        digests = [hashlib.blake2b(tensor_digest(view) + precision, digest_size=KEY_BYTES).digest() for view in pixels]
        if any(digest not in self.shards for digest in digests):
            self.shards.refresh()
        found = [self.shards.get(digest) for digest in digests]
        absent = [index for index, tokens in enumerate(found) if tokens is None]
        self.hits += len(found) - len(absent)
        self.misses += len(absent)
        if absent:
            made = self._forward(pixels[absent])
            for index, tokens in zip(absent, torch.cat([made.prefix, made.patches], dim=1).cpu(), strict=True):
                found[index] = tokens.flatten()
                self.shards.add(digests[index], tokens)
        tokens = torch.stack([each for each in found if each is not None]).to(pixels.device)
        tokens = tokens.view(len(pixels), -1, self.encoder.embed_dim)
        num_prefix = self.encoder.num_prefix_tokens
        return VisionFeatures(tokens[:, :num_prefix], tokens[:, num_prefix:], self.encoder.grid_size)


def cache_encoders(model: SphinxModel, folder: Path) -> list[FeatureCache]:
    """Add the disk cache to every frozen encoder of a model.

    Args:
        model: Changed in place.
        folder: Folder of the files.
    """
    caches = []
    for branch in [] if model.vision is None else model.vision.branches:
        for encoder in branch.encoders:
            if not encoder.trainable:
                cache = FeatureCache(encoder, folder)
                encoder.forward = cache  # type: ignore[method-assign]
                caches.append(cache)
    return caches
