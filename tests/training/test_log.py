from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sphinxkit.training.errors import TrainingError
from sphinxkit.training.log import RunLog, TensorBoard, plot_losses
from sphinxkit.training.log_records import read_log


def record(step: int) -> dict:
    return {"step": step, "loss": 1.0 / (step + 1), "losses": {"a": 1.0}, "lr": 0.1}


def test_a_resumed_log_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in range(4):
        log.on_step(record(step))
    log.on_end()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert len(read_log(tmp_path)) == 4
    log = RunLog(tmp_path, 2)
    log.on_step(record(2) | {"again": True})
    log.on_end()
    assert [entry["step"] for entry in read_log(tmp_path)] == [0, 1, 2]
    assert read_log(tmp_path)[2]["again"]
    assert read_log(tmp_path / "nowhere") == []


def test_the_plot_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plot_losses(tmp_path) is None
    log = RunLog(tmp_path, 0)
    log.on_step(record(0))
    log.on_step({"step": 1, "skipped": "nan"})
    log.on_end()
    assert plot_losses(tmp_path) == tmp_path / "loss.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_losses(tmp_path) is None


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class Writer:
        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TensorBoard(tmp_path)
    log.on_step(record(1) | {"data": "abc"})
    log.on_end(None)
    assert written == [("loss", 0.5, 1), ("losses/a", 1.0, 1), ("lr", 0.1, 1), "closed"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, 0)
    log.on_step(record(0))
    log.on_end()
    monkeypatch.setattr("os.fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    for write, name in ((lambda: RunLog(tmp_path, 1), "log.jsonl"), (lambda: plot_losses(tmp_path), "loss.png")):
        with pytest.raises(TrainingError, match=rf"{name} cannot be written: No space left on device"):
            write()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".sphinxkit-tmp")] == []
    assert len(read_log(tmp_path)) == 1
