"""Mixers: join several encoders' features, or several branches' tokens."""

from __future__ import annotations

from sphinxkit.mixers.base import FeatureMixer, TokenMixer, create, names, register, registry
from sphinxkit.mixers.channel import ChannelMixer
from sphinxkit.mixers.resample import pool_patches, resample_patches
from sphinxkit.mixers.sequence import SequenceMixer

__all__ = [
    "ChannelMixer",
    "FeatureMixer",
    "SequenceMixer",
    "TokenMixer",
    "create",
    "names",
    "pool_patches",
    "register",
    "registry",
    "resample_patches",
]
