"""Disk cache of frozen encoders' features, keyed by pixel content."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.atomic import atomic_file
from sphinxkit.encoders.base import Encoder
from sphinxkit.features import VisionFeatures
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.version import __version__


def _digest(tensor: Tensor) -> str:
    total = hashlib.blake2b(repr((tuple(tensor.shape), tensor.dtype)).encode(), digest_size=16)
    total.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _describe(value: Any) -> str:
    """A setting of a module in words that are the same in every process; values that are no settings by their type."""
    if isinstance(value, str | bytes | int | float | bool | torch.dtype | torch.Size | None):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_describe(key)}: {_describe(nested)}' for key, nested in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_describe(nested) for nested in value]
        return f"[{', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)}]"
    if isinstance(value, partial):
        return f"partial({_describe(value.func)}, {_describe(value.args)}, {_describe(value.keywords)})"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}({_describe({f.name: getattr(value, f.name) for f in fields(value)})})"
    if isinstance(value, types.MethodType):
        return _describe(value.__func__)
    if isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{_describe([value.__defaults__, value.__kwdefaults__, inside])}"
    kind = value if isinstance(value, type | types.BuiltinFunctionType) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def network_digest(module: nn.Module) -> str:
    """Hash everything that determines a network's output: weights, buffers, layer types and settings.

    Args:
        module: In eval mode.
    """
    total = hashlib.blake2b(__version__.encode(), digest_size=16)
    for name, layer in module.named_modules():
        settings = {key: value for key, value in vars(layer).items() if not _is_machinery(key)}
        total.update(f"{name}: {type(layer).__module__}.{type(layer).__qualname__} {_describe(settings)}\n".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        total.update(f"{name}: {_digest(tensor)}\n".encode())
    return total.hexdigest()


def _is_machinery(key: str) -> bool:
    """What ``nn.Module`` keeps for itself; parameters, buffers and layers below are walked."""
    return key in _MACHINERY or key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


_MACHINERY = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "forward"})


class FeatureCache:
    """Disk cache of ``Encoder.forward``.

    The file name is a hash of the network (see ``network_digest``) and the pixels of one view, so other weights,
    activations, dtypes or images use other files. An unreadable file is written again.

    Args:
        encoder: Frozen.
        folder: Cache folder; encoders, runs and processes may share it.
    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.encoder = encoder
        self.folder = folder / f"{encoder.name}-{network_digest(encoder)}"
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
        """Features of a batch of views; only views missing on disk are computed.

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
