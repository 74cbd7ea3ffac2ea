from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sphinxkit.cli.options import AnswerOptions, LoadOptions, option_groups


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(min=1, help="Columns.")] = 3
    height: int = 2


def test_a_group_becomes_options_in_its_place() -> None:
    seen = []

    @option_groups
    def command(*, name: str = "x", size: Size, last: bool = False) -> None:
        """Do it."""
        seen.append((name, size, last))

    app = typer.Typer()
    app.command()(command)
    runner = CliRunner()
    assert runner.invoke(app, []).exit_code == 0
    assert runner.invoke(app, ["--height", "7", "--last", "--name", "y", "--width", "9"]).exit_code == 0
    assert seen == [("x", Size(), False), ("y", Size(9, 7), True)]
    assert runner.invoke(app, ["--width", "0"]).exit_code == 2
    shown = runner.invoke(app, ["--help"]).stdout
    assert "Do it." in shown
    assert [shown.index(f"--{name}") for name in ("name", "width", "height", "last")] == sorted(
        shown.index(f"--{name}") for name in ("name", "width", "height", "last")
    )


def test_loading_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("sphinxkit.cli.options.load_model", lambda *given: seen.append(given))
    LoadOptions("r", "cuda:1", "float16", True, "first", "llama_ens5", 8, "cuda", ["o"], "t").load("models/mine")
    assert seen == [("models/mine", "r", "cuda:1", "float16", True, "first", "llama_ens5", 8, "cuda", ["o"], "t")]
    assert AnswerOptions().temperature == 0.0  # greedy unless told otherwise
