"""The table of components, made from the registries: ``python docs/component_table.py`` rewrites it.

It stands in ``docs/components.md`` and between the same two markers in README.md; a test fails when either is old.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs in a checkout that is not installed
TARGETS = (ROOT / "docs" / "components.md", ROOT / "README.md")
BEGIN, END = "<!-- components: begin -->", "<!-- components: end -->"
# Family -> the module that holds its registry; benchmarks are data, not builders.
FAMILIES = {
    "encoder": "sphinxkit.encoders",
    "mixer": "sphinxkit.mixers",
    "tiler": "sphinxkit.tilers",
    "projector": "sphinxkit.projectors",
    "language model": "sphinxkit.llama",
    "attention backend": "sphinxkit.llama.backends",
    "conversation": "sphinxkit.formatters",
    "task": "sphinxkit.formatters.tasks",
    "mixing method": "sphinxkit.interpolation",
}


def summary(builder: Any) -> str:
    """The first sentence of a builder's docstring."""
    text = (inspect.getdoc(builder) or "").split("\n\n")[0].replace("\n", " ").strip()
    text = re.split(r"(?<!\.)\.\s|; see |; the arguments ", text)[0]
    return text.replace("``", "`").replace("|", "\\|").rstrip(".")


def rows() -> Iterator[tuple[str, str, str]]:
    """(family, name, summary) of every component that comes with sphinxkit."""
    for family, module_name in FAMILIES.items():
        registry = importlib.import_module(module_name).registry
        for name in registry.names():
            builder = registry.get(name)
            if builder.__module__.split(".")[0] == "sphinxkit":  # plug-ins of this machine are not ours to list
                yield family, name, summary(builder)


def table() -> str:
    """The table in Markdown."""
    lines = ["| family | name | what it is |", "|---|---|---|"]
    previous = ""
    for family, name, text in rows():
        lines.append(f"| {family if family != previous else ''} | `{name}` | {text} |")
        previous = family
    return "\n".join(lines)


def updated(text: str) -> str:
    """``text`` with the table between its markers.

    Raises:
        ValueError: The markers are missing.
    """
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Rewrite the table where it stands."""
    for path in TARGETS:
        text = path.read_text()
        if BEGIN in text:
            path.write_text(updated(text))
        else:
            sys.stderr.write(f"{path.name} has no component table\n")


if __name__ == "__main__":
    main()
