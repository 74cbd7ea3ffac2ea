"""Checkpoint formats, one per file."""

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, get_format, names, register, registry
from sphinxkit.checkpoint.formats.hf import HuggingFace
from sphinxkit.checkpoint.formats.hf_sphinx import HuggingFaceSphinx
from sphinxkit.checkpoint.formats.meta import Meta
from sphinxkit.checkpoint.formats.native import Native
from sphinxkit.checkpoint.formats.released import Released
from sphinxkit.checkpoint.formats.tensor_folder import TensorFolder

__all__ = [
    "Format",
    "HuggingFace",
    "HuggingFaceSphinx",
    "Meta",
    "Native",
    "OpenOptions",
    "Released",
    "TensorFolder",
    "get_format",
    "names",
    "register",
    "registry",
]
