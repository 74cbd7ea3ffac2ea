"""The help of every command, and the library's errors in the words of the command line."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.cli.command import in_flags
from sphinxkit.errors import CheckpointError

LINES, COLUMNS = 30, 80


def find_commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from find_commands(command, *path, name)


COMMANDS = dict(find_commands(typer.main.get_command(app)))
OPTIONS = {
    path: [param for param in each.params if param.param_type_name == "option"] for path, each in COMMANDS.items()
}


def read_help(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": str(COLUMNS)}, prog_name="sphinxkit")
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_on_one_screen(path: tuple[str, ...]) -> None:
    lines = read_help(*path, "--help").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert not any(line.endswith("...") for line in lines[1:])  # a summary that was cut


@pytest.mark.parametrize("path", [path for path in COMMANDS if "\n\n" in (COMMANDS[path].help or "")], ids=" ".join)
def test_help_all_has_every_option_and_paragraph(path: tuple[str, ...]) -> None:
    text = read_help(*path, "--help-all")
    for option in OPTIONS[path]:
        assert any(name in text for name in option.opts + option.secondary_opts)
    told = set(COMMANDS[path].help.split())
    assert told <= set(text.split())


def test_help_has_the_common_options_alone() -> None:
    text = read_help("mix", "--help")
    assert "--beta " in text
    assert "sphinxkit mix --help-all" in text
    assert "--allow-nonfinite" not in text
    assert "in memory that is updated in place" not in text


def options(*path: str) -> list[Any]:
    return OPTIONS[path]


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        ("convert", "a: exists; pass overwrite=True to replace it", "a: exists; pass --overwrite to replace it"),
        ("convert", "pass replicas='first' to take it", "pass --replicas first to take it"),
        ("convert", "(verify=False loads them unchecked)", "(--no-verify loads them unchecked)"),
        ("convert", "num_shards=2: format 'hf' has none", "--shards 2: format 'hf' has none"),
        ("convert", "(to use another, pass recipe=)", "(to use another, pass --recipe)"),
        ("convert", "overlay= and tokenizer= are for a checkpoint", "--overlay and --tokenizer are for a checkpoint"),
        ("convert", "pass format='hf'.", "pass --to hf."),
        ("mix", "say where: rename={'lm_head.': PREFIX}", "say where: --rename lm_head.=PREFIX"),
        ("mix", "name it: base=MODEL", "name it: --base MODEL"),
        ("mix", "got weights=[0.5, 0.6], beta=0.5", "got --weights [0.5, 0.6], --beta 0.5"),
        ("train", "override 'overrides=3': no such key", "override 'overrides=3': no such key"),
        ("train", "a.overrides=1, /x/overrides=2, seed=3", "a.overrides=1, /x/overrides=2, seed=3"),
    ],
)
def test_arguments_become_flags(command: str, message: str, shown: str) -> None:
    assert in_flags(message, options(command)) == shown


def test_errors_name_flags_here_and_arguments_there(micro: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pass overwrite=True to replace it"):
        sphinxkit.convert(micro, micro)
    result = CliRunner().invoke(app, ["convert", str(micro), "-o", str(micro)])
    assert "pass --overwrite to replace it" in str(result.exception)


def test_the_library_names_no_flags() -> None:
    flags = {name for found in OPTIONS.values() for option in found for name in option.opts if name.startswith("--")}
    package = Path(sphinxkit.__file__).parent
    files = [
        file for file in package.rglob("*.py") if package / "cli" not in file.parents and " --" in file.read_text()
    ]
    nodes = itertools.chain.from_iterable(ast.walk(ast.parse(file.read_bytes())) for file in files)
    raised = [ast.unparse(node) for node in nodes if isinstance(node, ast.Raise) and node.exc]
    found = [text for text in raised if flags & set(re.findall(r"--[a-z-]+", text))]
    assert found == []
