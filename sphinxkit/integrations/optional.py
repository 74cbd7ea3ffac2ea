"""Optional packages: imported where they are needed, or an error that names the pip command."""

from __future__ import annotations

import importlib
from types import ModuleType

from sphinxkit.errors import SphinxkitError


class MissingPackageError(SphinxkitError, ImportError):
    """An optional package is not installed."""


def require(module: str, extra: str, *, oldest: str | None = None) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Its name.
        extra: The extra of sphinxkit that installs the package.
        oldest: The oldest version that will do, as far as its first two numbers; None: any.
    Raises:
        MissingPackageError: It cannot be imported, or is too old; the message names the pip command.
    """
    command = f'pip install "sphinxkit[{extra}]"'
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{module} cannot be imported ({error}); install it: {command}") from error
    version = str(getattr(found, "__version__", ""))
    if oldest is not None and version_numbers(version) < version_numbers(oldest):
        raise MissingPackageError(f"{module} {version} is too old, {oldest} or later is needed; install it: {command}")
    return found


def version_numbers(version: str) -> list[int]:
    """The first two numbers of a version, to compare.

    Args:
        version: Such as "5.24.0".
    """
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]
