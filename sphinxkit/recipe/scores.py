"""Scores for mixes: a Python function that gets the model, or a command that gets its directory."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinxkit.errors import DataError

PYTHON_PREFIX = "python:"
PLACEHOLDER = "{model}"


def is_python(score: str) -> bool:
    """Whether a score is a Python callable rather than a command."""
    return score.startswith(PYTHON_PREFIX)


def load_callable(score: str) -> Callable[[Any], float]:
    """The function named by ``python:package.module:function`` or ``python:path/to/file.py:function``.

    Raises:
        DataError: It cannot be imported or is not callable.
    """
    where, _, name = score.removeprefix(PYTHON_PREFIX).rpartition(":")
    if not where or not name:
        raise DataError(f"score {score!r}: expected python:module:function or python:file.py:function")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None:
                raise DataError(f"score {score!r}: {where} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise DataError(f"score {score!r} cannot be imported: {error}") from error
    if not callable(function):
        raise DataError(f"score {score!r} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def number(value: Any) -> float:
    """What a scoring function returned, as a float; a tensor or array of one element counts.

    Raises:
        DataError: It is not a number.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the scoring function must return a number, got {value!r}") from error


def check_command(score: str) -> list[str]:
    """The words of a score command.

    Raises:
        DataError: No ``{model}`` in it, or quotes that do not close.
    """
    try:
        words = shlex.split(score)
    except ValueError as error:
        raise DataError(f"score command {score!r}: {error}") from error
    if not any(PLACEHOLDER in word for word in words):
        raise DataError(
            f"score command {score!r} must contain {PLACEHOLDER}, which stands for the mixed model's directory; a "
            "Python function is python:module:function"
        )
    return words


def run_command(score: str, model: Path) -> float:
    """Run a score command on a model directory and read the score from its last line.

    No shell is involved: pipes and variables need ``sh -c '...'``.

    Args:
        score: The command with ``{model}``.
        model: Directory of the mix.
    Raises:
        DataError: It cannot be run, fails, or prints no score.
    """
    words = [word.replace(PLACEHOLDER, str(model)) for word in check_command(score)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own command
    except OSError as error:
        raise DataError(f"score command {words[0]!r} cannot be run: {error}") from error
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-3:]
        raise DataError(f"score command failed with exit code {done.returncode}: {' / '.join(tail) or 'no message'}")
    return parse_score(done.stdout)


def parse_score(output: str) -> float:
    """The score that a command printed: its last line, a number or a JSON object with ``score``.

    Args:
        output: Standard output.
    Raises:
        DataError: There is no such line, or it is not a finite number.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    try:
        value = json.loads(last)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        shown = last if len(last) < 200 else f"{last[:200]}..."
        raise DataError(f"the score command's last line must be a number or JSON with a number 'score', got {shown!r}")
    return float(value)
