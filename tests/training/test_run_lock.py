from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sphinxkit.training.errors import TrainingError
from sphinxkit.training.run_lock import LOCK_FILE, lock_folder


def test_the_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with lock_folder(folder):
        message = f"in use by another training run: process {os.getpid()} on .*, since 20"
        with pytest.raises(TrainingError, match=message), lock_folder(folder):
            pass
    with lock_folder(folder):  # free again, whatever the file says
        assert (folder / LOCK_FILE).exists()


def test_a_lock_without_a_name(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        (tmp_path / LOCK_FILE).write_text("{")
        with pytest.raises(TrainingError, match="it has just started"), lock_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    with pytest.raises(TrainingError, match=re.escape(f"{place}: cannot be written: ")), lock_folder(place):
        pass
