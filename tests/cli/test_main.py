"""How the command line ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import sphinxkit.cli
from sphinxkit.atomic import atomic_directory, atomic_file


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
