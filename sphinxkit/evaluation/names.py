"""Lists the names that recipes, commands and calls take: ``sphinxkit.list_names``."""

from __future__ import annotations

from importlib import import_module

from sphinxkit.errors import DataError
from sphinxkit.registry import suggest

_KINDS: dict[str, tuple[str, str]] = {
    "benchmarks": ("sphinxkit.evaluation.benchmarks", "names"),
    "data-formats": ("sphinxkit.data.converters", "FORMATS"),
    "encoders": ("sphinxkit.encoders", "names"),
    "formats": ("sphinxkit.checkpoint.formats", "names"),
    "methods": ("sphinxkit.interpolation", "names"),
    "mixers": ("sphinxkit.mixers", "names"),
    "recipes": ("sphinxkit.recipe", "shipped_recipes"),
    "tasks": ("sphinxkit.formatters.tasks", "names"),
    "tilers": ("sphinxkit.tilers", "names"),
}
"""Kind -> module, imported when it is listed, and its names: a function or a collection."""
KINDS = tuple(_KINDS)
"""What can be listed: ``formats`` are of checkpoints, ``data-formats`` of annotation files, ``methods`` of mixing."""


def list_names(kind: str) -> list[str]:
    """The names of a kind that this installation knows, plug-ins' included.

    Args:
        kind: One of ``KINDS``: "recipes", "tasks", "encoders", "formats", "methods", "benchmarks", ...
    Raises:
        DataError: There is no such kind.
    """
    if kind not in _KINDS:
        raise DataError(f"cannot list {kind!r:.80}{suggest(str(kind), KINDS) or '.'} Known: {', '.join(KINDS)}")
    module, attribute = _KINDS[kind]
    found = getattr(import_module(module), attribute)
    return sorted(found() if callable(found) else found)
