"""The command line: ``sphinxkit COMMAND``.

Exit codes: 0 success, 1 an expected error (its message on stderr), 2 wrong usage, 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer

from sphinxkit.cli.chat import chat
from sphinxkit.cli.check import check
from sphinxkit.cli.command import Command, Program
from sphinxkit.cli.convert import convert
from sphinxkit.cli.convert_data import convert_data
from sphinxkit.cli.data import app as data_app
from sphinxkit.cli.delta import app as delta_app
from sphinxkit.cli.demo import demo
from sphinxkit.cli.diff import diff
from sphinxkit.cli.evaluate import evaluate
from sphinxkit.cli.export import export
from sphinxkit.cli.fetch import fetch
from sphinxkit.cli.generate import generate
from sphinxkit.cli.inspect import inspect
from sphinxkit.cli.inspect_data import inspect_data
from sphinxkit.cli.list import list_names
from sphinxkit.cli.memory import memory
from sphinxkit.cli.mix import mix
from sphinxkit.cli.reproduce import reproduce
from sphinxkit.cli.score import score
from sphinxkit.cli.train import train
from sphinxkit.cli.verify import verify
from sphinxkit.errors import SphinxkitError
from sphinxkit.version import __version__

__all__ = ["app", "main"]

SPIN_COUNT = "1000"
"""Rounds that OpenMP's threads wait for work before they sleep. On a busy two-core machine a step of a 100 M model took
199 ms, with 50,000 rounds 1,130; on an idle one it makes no difference. Source: libgomp's manual, GOMP_SPINCOUNT (1,000
where threads compete)."""

app = typer.Typer(
    name="sphinxkit",
    cls=Program,
    help="SPHINX: load, ask, mix, convert and check multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sphinxkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """SPHINX: load, ask, mix, convert and check multimodal LLMs."""


for _command in (
    *(generate, chat, demo, verify, inspect, memory, check, fetch, convert, mix, diff),
    *(convert_data, inspect_data, evaluate, score, train, export, reproduce),
):
    app.command(_command.__name__.replace("_", "-"), cls=Command)(_command)
app.command("list", cls=Command)(list_names)
app.add_typer(delta_app, name="delta")
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; an expected error becomes one line on stderr and exit code 1."""
    before = signal.signal(signal.SIGTERM, _end)
    if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads it when torch is imported, later
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        app()
    except SphinxkitError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    """Leave as Ctrl-C does: what is half-written is removed on the way out."""
    del frame
    sys.exit(128 + number)
