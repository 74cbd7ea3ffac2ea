"""Frozen encoders' features on disk, by the content of the pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from sphinxkit.atomic import atomic_file
from sphinxkit.encoders.base import Encoder
from sphinxkit.features import VisionFeatures
from sphinxkit.sphinx_model import SphinxModel


def _digest(*tensors: Tensor) -> str:
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        total.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class FeatureCache:
    """What ``Encoder.forward`` gives, kept in files.

    A file belongs to the encoder's weights and the pixels of one view, so nothing stale is ever found: other weights,
    another dtype or another image are other names. A file that cannot be read is made anew.

    Args:
        encoder: Frozen.
        folder: Of the files; may be shared by encoders, runs and processes.
    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.encoder = encoder
        self.folder = folder / f"{encoder.name}-{_digest(*encoder.parameters())}"
        self.hits, self.misses = 0, 0
        self._forward = encoder.forward

    def _read(self, path: Path) -> tuple[Tensor, Tensor] | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            return tensors["prefix"], tensors["patches"]
        except (OSError, SafetensorError, KeyError):
            return None

    def __call__(self, pixels: Tensor) -> VisionFeatures:
        """Features of a batch of views; only those that are not on disk are computed.

        Shape:
            pixels: (B, 3, S, S)
            return: as ``Encoder.forward``
        """
        from safetensors.torch import save_file

        names = [_digest(view) for view in pixels]
        paths = [self.folder / name[:2] / f"{name}.safetensors" for name in names]
        found = [self._read(path) for path in paths]
        absent = [index for index, pair in enumerate(found) if pair is None]
        self.hits += len(found) - len(absent)
        self.misses += len(absent)
        if absent:
            made = self._forward(pixels[absent])
            for row, index in enumerate(absent):
                pair = made.prefix[row].cpu().contiguous(), made.patches[row].cpu().contiguous()
                found[index] = pair
                with atomic_file(paths[index]) as temporary:
                    save_file({"prefix": pair[0], "patches": pair[1]}, temporary)
        pairs = [pair for pair in found if pair is not None]
        prefix, patches = (torch.stack([pair[side] for pair in pairs]).to(pixels.device) for side in (0, 1))
        return VisionFeatures(prefix, patches, self.encoder.grid_size)


def cache_encoders(model: SphinxModel, folder: Path) -> list[FeatureCache]:
    """Let every frozen encoder of a model look on the disk first.

    Args:
        model: Changed in place.
        folder: Of the files.
    """
    caches = []
    for branch in [] if model.vision is None else model.vision.branches:
        for encoder in branch.encoders:
            if not encoder.trainable:
                cache = FeatureCache(encoder, folder)
                encoder.forward = cache  # type: ignore[method-assign]
                caches.append(cache)
    return caches
