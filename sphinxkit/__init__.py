"""sphinxkit: SPHINX (arXiv:2311.07575) as a library of independent parts and recipe files that assemble them.

Families (``sphinxkit.encoders``, ``sphinxkit.mixers``, ...) and the public functions are imported at first use, so that
``import sphinxkit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sphinxkit.version import __version__

if TYPE_CHECKING:
    from sphinxkit.data.converters.convert import convert_data
    from sphinxkit.data.sources.files import index_data
    from sphinxkit.evaluation.benchmarks import score
    from sphinxkit.evaluation.names import list_names
    from sphinxkit.evaluation.parity import verify
    from sphinxkit.evaluation.run import evaluate
    from sphinxkit.integrations.hub import push_to_hub
    from sphinxkit.recipe.build import build
    from sphinxkit.recipe.check import check
    from sphinxkit.recipe.convert import convert
    from sphinxkit.recipe.data_inspection import inspect_data
    from sphinxkit.recipe.deltas import apply_delta, extract_delta
    from sphinxkit.recipe.differences import diff
    from sphinxkit.recipe.fetch import fetch
    from sphinxkit.recipe.inspection import inspect
    from sphinxkit.recipe.io import load
    from sphinxkit.recipe.memory import memory
    from sphinxkit.recipe.mixing import mix
    from sphinxkit.recipe.recipe import Recipe
    from sphinxkit.training.export_run import export
    from sphinxkit.training.run import train

_HOMES = {
    "Recipe": "sphinxkit.recipe.recipe",
    "apply_delta": "sphinxkit.recipe.deltas",
    "build": "sphinxkit.recipe.build",
    "check": "sphinxkit.recipe.check",
    "convert": "sphinxkit.recipe.convert",
    "convert_data": "sphinxkit.data.converters.convert",
    "diff": "sphinxkit.recipe.differences",
    "evaluate": "sphinxkit.evaluation.run",
    "export": "sphinxkit.training.export_run",
    "extract_delta": "sphinxkit.recipe.deltas",
    "fetch": "sphinxkit.recipe.fetch",
    "index_data": "sphinxkit.data.sources.files",
    "inspect": "sphinxkit.recipe.inspection",
    "inspect_data": "sphinxkit.recipe.data_inspection",
    "list_names": "sphinxkit.evaluation.names",
    "load": "sphinxkit.recipe.io",
    "memory": "sphinxkit.recipe.memory",
    "mix": "sphinxkit.recipe.mixing",
    "push_to_hub": "sphinxkit.integrations.hub",
    "score": "sphinxkit.evaluation.benchmarks",
    "train": "sphinxkit.training.run",
    "verify": "sphinxkit.evaluation.parity",
}
"""Public names and the modules that define them."""

_FAMILIES = frozenset(
    {
        *("batch_inference", "checkpoint", "data", "encoders", "evaluation", "formatters", "generation"),
        *("integrations", "interpolation", "llama", "mixers", "nano", "projectors", "recipe", "sphinx_model"),
        *("tilers", "tokenizer", "training", "vision"),
    }
)

__all__ = [
    "Recipe",
    "__version__",
    "apply_delta",
    "build",
    "check",
    "convert",
    "convert_data",
    "diff",
    "evaluate",
    "export",
    "extract_delta",
    "fetch",
    "index_data",
    "inspect",
    "inspect_data",
    "list_names",
    "load",
    "memory",
    "mix",
    "push_to_hub",
    "score",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _FAMILIES:
        value = importlib.import_module(f"sphinxkit.{name}")
    else:
        raise AttributeError(f"module 'sphinxkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES, *_FAMILIES})
