"""Write one API page per part of the package; the pages hold directives only, the text is in the docstrings.

A class or function stands under the name to import it by: the package that exports it, else its own module.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import sphinxkit

SKIPPED = {"__main__", "cli"}  # commands have a page of their own (cli_page)


def modules() -> dict[str, list[ModuleType]]:
    """Part of the package -> its modules, the part's own first."""
    parts: dict[str, list[ModuleType]] = {}
    for info in pkgutil.walk_packages(sphinxkit.__path__, "sphinxkit."):
        names = info.name.split(".")[1:]
        if any(name in SKIPPED or name.startswith("_") for name in names):
            continue
        try:
            parts.setdefault(names[0], []).append(importlib.import_module(info.name))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("sphinxkit"):
                raise  # else a class for another library, which is not installed here
    return dict(sorted(parts.items()))


def _is_documentable(value: object) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("sphinxkit")


def members(module: ModuleType, taken: set[int]) -> list[str]:
    """The names that the page of ``module`` documents: exported ones, or its own that no package exports."""
    exported = getattr(module, "__all__", None)
    names = exported if exported is not None and hasattr(module, "__path__") else list(vars(module))
    found = []
    for name in names:
        value = getattr(module, name, None)
        own = hasattr(module, "__path__") or getattr(value, "__module__", "") == module.__name__
        if not name.startswith("_") and own and _is_documentable(value) and id(value) not in taken:
            found.append(name)
            taken.add(id(value))
    return found


def page(part: str, found: list[ModuleType]) -> str:
    """The page of one part, in reStructuredText."""
    title = f"sphinxkit.{part}"
    lines = [title, "=" * len(title), ""]
    taken: set[int] = set()
    names = {module.__name__: members(module, taken) for module in sorted(found, key=lambda m: m.__name__.count("."))}
    documented = {f"{module}.{name}" for module, group in names.items() for name in group}
    for module in found:
        name = module.__name__
        if name != title:
            if not names[name]:
                continue
            lines += [name, "-" * len(name), ""]
        lines += [f".. automodule:: {name}"]
        if names[name]:
            lines += [f"   :members: {', '.join(names[name])}"]
        else:
            lines += ["   :no-members:"]
        if name in documented:  # a module called like a function that its package exports
            lines += ["   :no-index:"]
        lines += [""]
    return "\n".join(lines)


def index(parts: list[str]) -> str:
    """The page that lists them all."""
    entries = "\n".join(f"   {part}" for part in parts)
    text = "Made from the docstrings. Every page is one part of the package; each can be imported alone."
    return f"API\n===\n\n{text}\n\n.. toctree::\n   :maxdepth: 1\n\n{entries}\n"


def write(folder: Path) -> None:
    """Write every page that changed and remove those of parts that are gone."""
    folder.mkdir(exist_ok=True)
    found = modules()
    pages = {f"{part}.rst": page(part, group) for part, group in found.items()}
    pages["index.rst"] = index(list(found))
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
