"""A command: its help in two parts, its errors in the words of the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from sphinxkit.errors import SphinxkitError

_HELP_ALL = "--help-all"
_ARGUMENT = re.compile(r"""(?<![\w.='"/-])(\w+)=(\{[^{}]*\}|\[[^\]]*\]|\([^)]*\)|'[^']*'|"[^"]*"|[\w/-]+(?:\.\w+)*|)""")

_AnyCommand = TypeVar("_AnyCommand", bound=Callable[..., None])


def common_options(*names: str) -> Callable[[_AnyCommand], _AnyCommand]:
    """Let a command's ``--help`` show these options alone.

    Args:
        names: Names of parameters.
    """

    def mark(command: _AnyCommand) -> _AnyCommand:
        command.common_options = names  # type: ignore[attr-defined]
        return command

    return mark


def in_flags(message: str, options: Iterable[Any]) -> str:
    """A message of the library in the words of the command line: ``overwrite=True`` becomes ``--overwrite``.

    Args:
        message: It names arguments as ``name=value`` or ``name=``.
        options: Parameters of the running command; their names are those of the library's arguments, or
            ``no_`` and a name.
    """
    flags = {option.name: option for option in options if option.param_type_name == "option"}

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        found = flags.get(f"no_{name}") if value == "False" else flags.get(name)
        if found is None:
            return match.group()
        shown = value.strip("{}'\"").replace("'", "").replace(": ", "=")
        return " ".join((found.opts[0], *([] if value in ("", "True", "False") else [shown])))

    return _ARGUMENT.sub(flag, message)


class Command(TyperCommand):
    """A command with ``--help`` (summary, examples, common options) and ``--help-all``; errors name its flags."""

    shows_all = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; ``--help-all`` ends the program."""
        if _HELP_ALL in args:
            self.shows_all = True
            typer.echo(ctx.get_help())
            raise typer.Exit
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SphinxkitError as error:
            error.args = (in_flags(str(error), self.params),)
            raise

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the first paragraph and the examples, or the whole text."""
        summary, *others = inspect.cleandoc(self.help or "").split("\n\n")
        examples = [f"\b\n{text}" if text.startswith("Example") else text for text in others]
        shown = [text for text in examples if self.shows_all or text.startswith("\b")]
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("\n\n".join((summary, *shown)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the common options, or all."""
        common = getattr(self.callback, "common_options", None)
        for option in self.params:
            if option.param_type_name == "option":
                option.hidden = not (self.shows_all or common is None or option.name in common)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Say where the rest is."""
        if not self.shows_all and self._has_more():
            formatter.write_paragraph()
            formatter.write_text(f"All options and details: {ctx.command_path} {_HELP_ALL}")

    def _has_more(self) -> bool:
        return hasattr(self.callback, "common_options") or len((self.help or "").split("\n\n")) > 2


class Program(TyperGroup):
    """The program; its help names the commands and leaves the options of completion out."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options and commands."""
        for option in self.params:
            option.hidden = "completion" in (option.name or "")  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)
