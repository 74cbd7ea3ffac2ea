"""How the command line ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import sphinxkit.cli
from sphinxkit.atomic import atomic_directory, atomic_file
from sphinxkit.errors import DataError


def test_sigterm_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def app() -> None:
        with atomic_directory(tmp_path / "model") as folder, atomic_file(tmp_path / "file") as file:
            (folder / "a").write_text("half")
            file.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sphinxkit.cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        sphinxkit.cli.main()
    assert ended.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("exists; pass overwrite=True (--overwrite) to replace it", "exists; pass --overwrite to replace it"),
        ("pass replicas='first' (--replicas first) to", "pass --replicas first to"),
        ("say allow_nonfinite (--allow-nonfinite) to go on", "say --allow-nonfinite to go on"),
        ("num_shards=0 (--shards): expected", "--shards: expected"),
        ("name the one to keep (--tokenizer FILE)", "name the one to keep (--tokenizer FILE)"),
    ],
)
def test_errors_name_flags_alone(
    message: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise DataError(message)

    monkeypatch.setattr(sphinxkit.cli, "app", app)
    with pytest.raises(SystemExit):
        sphinxkit.cli.main()
    assert capsys.readouterr().err == f"error: {shown}\n"
