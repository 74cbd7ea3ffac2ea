"""``sphinxkit list`` and the values that a shell completes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import sphinxkit
from sphinxkit import encoders
from sphinxkit.cli import app
from sphinxkit.errors import DataError
from sphinxkit.evaluation.names import KINDS
from sphinxkit.recipe import shipped_recipes


def run(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_names_of_every_kind() -> None:
    for kind in KINDS:
        names = sphinxkit.list_names(kind)
        assert names == sorted(set(names)) != []
        assert run("list", kind).split() == names
    assert sphinxkit.list_names("recipes") == sorted(shipped_recipes())
    assert json.loads(run("list", "encoders", "--json")) == {"encoders": encoders.names()}
    assert {"rec", "pose"} <= set(sphinxkit.list_names("tasks"))
    assert {"hf", "meta", "sphinx", "sphinxkit"} <= set(sphinxkit.list_names("formats"))


def test_an_unknown_kind() -> None:
    with pytest.raises(DataError, match=r"cannot list 'recipe'; did you mean 'recipes'\? Known: benchmarks, "):
        sphinxkit.list_names("recipe")


def complete(words: str) -> list[str]:
    """What a shell gets for the last word of a command line."""
    environment = {"_SPHINXKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(app, prog_name="sphinxkit", env=environment)
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sphinxkit generate --task re", ["rec", "reg", "relation"]),
        ("sphinxkit generate na", ["nano"]),
        ("sphinxkit verify n", ["nano"]),
        ("sphinxkit train pretrain_13", ["pretrain_13b"]),
        ("sphinxkit memory sphinx_ti", ["sphinx_tiny", "sphinx_tiny_1k"]),
        ("sphinxkit mix --method greedy", ["greedy_soup"]),
        ("sphinxkit convert --to s", ["safetensors", "sphinx", "sphinxkit"]),
        ("sphinxkit list enc", ["encoders"]),
        ("sphinxkit convert-data --format vq", ["vqav2"]),
        ("sphinxkit evaluate nano refcocog_v", ["refcocog_val"]),
    ],
)
def test_completion(words: str, expected: list[str]) -> None:
    assert complete(words) == expected
