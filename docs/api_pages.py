"""Write one API page per part of the package; the pages hold directives only, the text is in the docstrings."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import sphinxkit

# Entry points and private modules have no API of their own.
SKIPPED = {"__main__"}


def modules() -> dict[str, list[str]]:
    """Part of the package -> its modules, the part's own first."""
    parts: dict[str, list[str]] = {}
    for info in pkgutil.walk_packages(sphinxkit.__path__, "sphinxkit."):
        names = info.name.split(".")[1:]
        if not any(name in SKIPPED or name.startswith("_") for name in names):
            parts.setdefault(names[0], []).append(info.name)
    return dict(sorted(parts.items()))


def page(part: str, names: list[str]) -> str:
    """The page of one part, in reStructuredText."""
    title = f"sphinxkit.{part}"
    lines = [title, "=" * len(title), ""]
    for name in names:
        if name != title:
            lines += [name, "-" * len(name), ""]
        lines += [f".. automodule:: {name}", ""]
    return "\n".join(lines)


def index(parts: list[str]) -> str:
    """The page that lists them all."""
    entries = "\n".join(f"   {part}" for part in parts)
    text = "Made from the docstrings. Every page is one part of the package; all of it can be imported alone."
    return f"API\n===\n\n{text}\n\n.. toctree::\n   :maxdepth: 2\n\n{entries}\n"


def write(folder: Path) -> None:
    """Write every page that changed and remove those of parts that are gone."""
    folder.mkdir(exist_ok=True)
    found = modules()
    pages = {f"{part}.rst": page(part, names) for part, names in found.items()}
    pages["index.rst"] = index(list(found))
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
