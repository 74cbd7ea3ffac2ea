"""Tilers: from an image file to the views that encoders see."""

from __future__ import annotations

from sphinxkit.tilers.base import Tiler, create, names, register, registry
from sphinxkit.tilers.grid import GridTiler
from sphinxkit.tilers.images import ImageSource, image_below, load_image, to_rgb
from sphinxkit.tilers.preprocess import Preprocessor, pad_and_resize, preprocess

__all__ = [
    "GridTiler",
    "ImageSource",
    "Preprocessor",
    "Tiler",
    "create",
    "image_below",
    "load_image",
    "names",
    "pad_and_resize",
    "preprocess",
    "register",
    "registry",
    "to_rgb",
]
