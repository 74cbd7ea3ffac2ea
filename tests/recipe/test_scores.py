from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinxkit.errors import DataError
from sphinxkit.recipe.scores import check_command, load_callable, number, parse_score, run_command


def test_scores_are_the_last_line() -> None:
    assert parse_score("loading\n0.75\n\n") == 0.75
    assert parse_score('{"score": 3, "n": 10}') == 3.0


@pytest.mark.parametrize("output", ["", "done", '{"accuracy": 1}', "true", "NaN", "[1]", "x" * 500])
def test_outputs_without_a_score(output: str) -> None:
    with pytest.raises(DataError, match="last line must be a number"):
        parse_score(output)


def test_scoring_functions(tmp_path: Path) -> None:
    assert load_callable("python:math:sqrt")(4.0) == 2.0
    broken = tmp_path / "broken.py"
    broken.write_text("def (")
    for score, message in (
        ("python:math", "expected python:module:function"),
        ("python:no_such_module:f", "cannot be imported"),
        ("python:math:no_such", "cannot be imported"),
        ("python:math:pi", "is float, not a function"),
        (f"python:{tmp_path}/none.py:f", "cannot be imported"),
        (f"python:{broken}:f", "cannot be imported"),
    ):
        with pytest.raises(DataError, match=message):
            load_callable(score)
    with pytest.raises(DataError, match="No closing quotation"):
        check_command("x 'y {model}")
    with pytest.raises(DataError, match="cannot be run"):
        run_command("/no/such/program {model}", tmp_path)
    with pytest.raises(DataError, match="failed with exit code 3: oh no"):
        run_command("sh -c 'echo oh no >&2; exit 3' {model}", tmp_path)
    assert run_command("sh -c 'echo 0.5' {model}", tmp_path) == 0.5


def test_numbers() -> None:
    assert number(torch.tensor([0.5], requires_grad=True)) == 0.5
    with pytest.raises(DataError, match="must return a number, got 'good'"):
        number("good")
