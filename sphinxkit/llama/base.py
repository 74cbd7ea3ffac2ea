"""The names of language models."""

from __future__ import annotations

from sphinxkit.llama.model import LlamaModel
from sphinxkit.registry import Registry

registry: Registry[LlamaModel] = Registry("language model")
