from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.integrations.optional import MissingPackageError

OPTIONS = ["--port", "8000", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "9"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks to serve; the server ends at once."""
    calls: list[dict[str, Any]] = []

    @contextmanager
    def serving(model: Any, **options: Any) -> Iterator[str]:
        calls.append({"model": model, **options})
        yield "http://127.0.0.1:8000/"

    monkeypatch.setattr("sphinxkit.integrations.demo.serving", serving)
    monkeypatch.setattr("sphinxkit.integrations.demo.import_gradio", lambda: None)
    monkeypatch.setattr("threading.Event.wait", lambda self: None)
    return calls


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackageError, match=r'install it: pip install "sphinxkit\[demo\]"'):
        CliRunner().invoke(app, ["demo"], catch_exceptions=False)


@pytest.mark.usefixtures("embedded")
def test_nano_is_served_with_what_it_knows(served: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(app, ["demo", *OPTIONS], catch_exceptions=False)
    assert result.stdout == "http://127.0.0.1:8000/ (Ctrl-C ends)\n"
    [call] = served
    assert (call["host"], call["port"]) == ("127.0.0.1", 8000)
    assert call["sampling"].max_new_tokens == 9
    assert call["title"] == "SPHINX-nano"
    assert "never seen a photograph" in call["about"]
    assert len(call["examples"]) == 8


def test_another_checkpoint_is_described_by_its_recipe(served: list[dict[str, Any]], micro: Path) -> None:
    CliRunner().invoke(app, ["demo", str(micro), *OPTIONS], catch_exceptions=False)
    assert served[0]["title"] == micro.name
    assert "about" not in served[0]
    assert "examples" not in served[0]  # they are SPHINX-nano's
