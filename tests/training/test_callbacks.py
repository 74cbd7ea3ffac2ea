from __future__ import annotations

import io
from pathlib import Path

from sphinxkit.training import ProgressReport, TrainResult
from sphinxkit.training.callbacks import duration, progress_line

RECORD = {
    "step": 4,
    "num_steps": 10,
    "loss": 1.5,
    "losses": {"all": 1.5},
    "grad_norm": 0.25,
    "lr": 1e-3,
    "mfu": 0.125,
    "samples": 8,
    "seconds": 2.0,
    "tokens_per_second": 1234.5,
    "seconds_left": 61.0,
    "total": {"bad": 0, "too_long": 3, "truncated": 1200, "skipped_steps": 0},
}


def test_the_progress_line() -> None:
    assert progress_line(RECORD) == (
        "step 5/10  loss 1.5000  norm 0.250  lr 1.00e-03  4.0 samples/s  1,234 tokens/s  MFU 12.5%"
        "  so far 3 too long, 1,200 cut to fit  0:01:01 left"
    )
    plain = progress_line(RECORD | {"total": {}, "mfu": None, "losses": {"a": 1.0, "b": 2.0}})
    assert plain.startswith("step 5/10  loss 1.5000 (a 1.0000, b 2.0000)  norm 0.250")
    assert "so far" not in plain
    assert "MFU" not in plain
    assert progress_line({"step": 0, "num_steps": 2, "skipped": "why"}) == "step 1/2  skipped: why"
    assert duration(3723.4) == "1:02:03"


def test_the_report_ends_with_the_result() -> None:
    stream = io.StringIO()
    report = ProgressReport(stream)
    report.on_step(RECORD)
    report.on_checkpoint(5, Path("step-5"))
    report.on_end(None)
    report.on_end(TrainResult("paused", 5, 10, Path("runs/a")))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 5/10")
    assert lines[1:] == ["paused at step 5 of 10: runs/a"]
