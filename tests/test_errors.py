from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sphinxkit
from sphinxkit.errors import CheckpointError, raise_errors


def test_long_lists_of_errors_are_cut() -> None:
    raise_errors("nothing", [])
    with pytest.raises(CheckpointError, match=r"(?s)wrong:\n  - 0.*  - 49\n  \.\.\. and 3 more$"):
        raise_errors("wrong", [str(index) for index in range(53)])


def test_json_that_cannot_be_read_may_also_be_nested_without_end() -> None:
    forgetful = []
    for path in sorted(Path(sphinxkit.__file__).parent.rglob("*.py")):
        tries = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Try)]
        for node in tries:
            body = "\n".join(ast.unparse(statement) for statement in node.body)
            caught = [ast.unparse(handler.type) for handler in node.handlers if handler.type is not None]
            if any(call in body for call in ("json.loads(", "json.load(")) and "ValueError" in "".join(caught):
                is_named = any("RecursionError" in each or each == "Exception" for each in caught)
                forgetful += [] if is_named else [f"{path}:{node.lineno}"]
    assert not forgetful
