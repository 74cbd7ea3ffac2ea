"""Mixers: several encoders' tokens, or several branches' tokens, made one."""

from __future__ import annotations

from torch import nn

from sphinxkit.mixers.channel import ChannelMixer
from sphinxkit.mixers.resample import pool_patches, resample_patches
from sphinxkit.mixers.sequence import SequenceMixer
from sphinxkit.registry import Registry

__all__ = [
    "ChannelMixer",
    "SequenceMixer",
    "create",
    "names",
    "pool_patches",
    "register",
    "registry",
    "resample_patches",
]

registry: Registry[nn.Module] = Registry("mixer", {"channel": ChannelMixer, "sequence": SequenceMixer})
register = registry.register
create = registry.build
names = registry.names
