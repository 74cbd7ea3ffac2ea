"""Tilers: from an image file to the views that encoders see."""

from __future__ import annotations

from sphinxkit.registry import Registry
from sphinxkit.tilers.grid import GridTiler
from sphinxkit.tilers.images import load_image, to_rgb
from sphinxkit.tilers.preprocess import Preprocessor, pad_and_resize, preprocess

__all__ = [
    "GridTiler",
    "Preprocessor",
    "create",
    "load_image",
    "names",
    "pad_and_resize",
    "preprocess",
    "register",
    "registry",
    "to_rgb",
]

registry: Registry[GridTiler] = Registry("tiler", {"grid": GridTiler})
register = registry.register
create = registry.build
names = registry.names
