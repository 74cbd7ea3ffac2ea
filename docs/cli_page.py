"""Write the reference of the command line from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _lines(command: Any, path: str, depth: int) -> Iterator[str]:
    title = path or "sphinxkit"
    yield f"{'#' * depth} `{title}`\n"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("Example"):
            heading, *lines = paragraph.splitlines()
            paragraph = "\n".join((heading, "", "```", *(line.strip() for line in lines), "```"))
        yield paragraph + "\n"
    options = [option for option in command.params if option.name != "help"]
    if options:
        yield "| argument | meaning |"
        yield "|---|---|"
    for option in options:
        names = ", ".join(f"`{name}`" for name in option.opts + option.secondary_opts)
        if option.param_type_name == "argument":
            names = f"`{(option.metavar or option.name or '').upper()}`"
        default = option.default
        hidden = default is None or default is False or default in ("", (), []) or callable(default)
        shown = "" if hidden else f" Default `{default}`."
        text = " ".join((getattr(option, "help", None) or "").split()).replace("|", "\\|")
        yield f"| {names} | {text}{shown} |"
    yield ""
    for name, sub in sorted(getattr(command, "commands", {}).items()):
        yield from _lines(sub, f"{title} {name}", depth + 1)


def page() -> str:
    """The page, in Markdown."""
    import typer

    from sphinxkit.cli import app

    return "\n".join(["# Command line\n", *_lines(typer.main.get_command(app), "", 2)])


def write(path: Path) -> None:
    """Write the page if it changed."""
    text = page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
