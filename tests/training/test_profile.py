from __future__ import annotations

import json
from pathlib import Path

import torch

from sphinxkit.training.profile import StepProfile


def steps(profile: StepProfile, last: int) -> None:
    for step in range(1, last + 1):
        profile.before(step)
        torch.ones(3).cumsum(0) if step == 2 else torch.ones(3).cumprod(0)
        profile.after(step)
    profile.close()


def test_the_steps_asked_for_are_in_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    steps(StepProfile(path, 2, 2), 4)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::cumsum" in names
    assert "aten::cumprod" not in names


def test_a_run_that_never_gets_there_writes_nothing(tmp_path: Path) -> None:
    steps(StepProfile(tmp_path / "profile.json", 5, 6), 3)
    assert list(tmp_path.iterdir()) == []
