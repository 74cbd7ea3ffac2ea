"""Reading and writing checkpoints: released SPHINX shards, Meta's, Hugging Face's, and sphinxkit's own.

Everything is lazy: files are mapped, tensors are read one by one under canonical names, and written one by one.
"""

from sphinxkit.checkpoint.keymap import KeyMap, NameRule, hf_key_map, meta_key_map, sphinx_key_map
from sphinxkit.checkpoint.loading import LoadReport, load_into
from sphinxkit.checkpoint.opening import FORMATS, Format, detect
from sphinxkit.checkpoint.opening import open_checkpoint as open
from sphinxkit.checkpoint.reader import Checkpoint
from sphinxkit.checkpoint.resolve import resolve
from sphinxkit.checkpoint.saving import save
from sphinxkit.tensor_source import MappingSource, ModuleSource

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Format",
    "KeyMap",
    "LoadReport",
    "MappingSource",
    "ModuleSource",
    "NameRule",
    "detect",
    "hf_key_map",
    "load_into",
    "meta_key_map",
    "open",
    "resolve",
    "save",
    "sphinx_key_map",
]
