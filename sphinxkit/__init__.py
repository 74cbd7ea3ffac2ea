"""sphinxkit: SPHINX (arXiv:2311.07575) as a library of independent parts and recipe files that assemble them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinxkit.recipe.build import build
    from sphinxkit.recipe.io import load
    from sphinxkit.recipe.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Recipe", "build", "load"):
        import sphinxkit.recipe

        return getattr(sphinxkit.recipe, name)
    raise AttributeError(f"module 'sphinxkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
