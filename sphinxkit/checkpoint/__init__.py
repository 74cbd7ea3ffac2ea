"""Reading and writing checkpoints: released SPHINX shards, Meta's, Hugging Face's, and sphinxkit's own.

Everything is lazy: files are mapped, tensors are read one by one under canonical names, and written one by one.
"""

from sphinxkit.checkpoint import formats
from sphinxkit.checkpoint.formats.hf import hf_key_map
from sphinxkit.checkpoint.formats.meta import meta_key_map
from sphinxkit.checkpoint.formats.released import sphinx_key_map
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.load import LoadReport, load_into
from sphinxkit.checkpoint.open import detect, overlay
from sphinxkit.checkpoint.open import open_checkpoint as open
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.resolve import resolve
from sphinxkit.checkpoint.save import save
from sphinxkit.tensor_source import MappingSource, ModuleSource

__all__ = [
    "Checkpoint",
    "KeyMap",
    "LoadReport",
    "MappingSource",
    "ModuleSource",
    "NameRule",
    "detect",
    "formats",
    "hf_key_map",
    "load_into",
    "meta_key_map",
    "open",
    "overlay",
    "resolve",
    "save",
    "sphinx_key_map",
]
