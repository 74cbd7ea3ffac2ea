"""The records of a run's log, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


def read_log(folder: Path, name: str = LOG_FILE) -> list[dict[str, Any]]:
    """Read the log records of a run, oldest first; an incomplete last line (of a killed run) is ignored.

    Args:
        folder: Run folder.
        name: ``LOG_FILE`` (steps) or ``EVALUATIONS_FILE``.
    """
    path = folder / name
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
