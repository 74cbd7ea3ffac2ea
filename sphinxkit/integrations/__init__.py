"""Doors to other libraries. Each needs an optional package; the message of a missing one names the pip command."""

from __future__ import annotations

from sphinxkit.integrations import transformers
from sphinxkit.integrations.optional import MissingPackageError

__all__ = ["MissingPackageError", "transformers"]
