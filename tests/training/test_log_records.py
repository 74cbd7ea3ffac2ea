from __future__ import annotations

from pathlib import Path

from sphinxkit.training.log_records import EVALUATIONS_FILE, read_log


def test_a_killed_run_leaves_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n[1]\n{"note": 0}\n{"step": 2}\n{"step": 3, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2}]
    assert read_log(tmp_path, EVALUATIONS_FILE) == []
