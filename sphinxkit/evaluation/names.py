"""Lists the names that recipes, commands and calls take: ``sphinxkit.list_names``."""

from __future__ import annotations

from collections.abc import Callable

from sphinxkit.errors import DataError
from sphinxkit.registry import suggest


def _benchmarks() -> list[str]:
    from sphinxkit.evaluation.benchmarks import names

    return names()


def _encoders() -> list[str]:
    from sphinxkit.encoders import names

    return names()


def _formats() -> list[str]:
    from sphinxkit.checkpoint.formats import names

    return names()


def _data_formats() -> list[str]:
    from sphinxkit.data.converters import FORMATS

    return sorted(FORMATS)


def _methods() -> list[str]:
    from sphinxkit.interpolation import names

    return names()


def _mixers() -> list[str]:
    from sphinxkit.mixers import names

    return names()


def _recipes() -> list[str]:
    from sphinxkit.recipe import shipped_recipes

    return list(shipped_recipes())


def _tasks() -> list[str]:
    from sphinxkit.formatters.tasks import names

    return names()


def _tilers() -> list[str]:
    from sphinxkit.tilers import names

    return names()


_KINDS: dict[str, Callable[[], list[str]]] = {
    "benchmarks": _benchmarks,
    "data-formats": _data_formats,
    "encoders": _encoders,
    "formats": _formats,
    "methods": _methods,
    "mixers": _mixers,
    "recipes": _recipes,
    "tasks": _tasks,
    "tilers": _tilers,
}
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
    return sorted(_KINDS[kind]())
