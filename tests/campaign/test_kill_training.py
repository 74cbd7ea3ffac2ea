"""Kills of training: what is resumed ends bit for bit as an undisturbed run, and every checkpoint can be loaded."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.training import read_log
from sphinxkit.training.log_records import EVALUATIONS_FILE
from sphinxkit.training.state import saved_steps
from tests.campaign import trial

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(7200)]
NUM_PLACES = 80  # file operations at which a run is killed
NUM_CHAINS = 20  # runs that are killed again and again
NUM_TIMED = 10  # kills at a random time
SEED = 2311
STOPPED = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, 0), signal.SIGINT: (130, 0)}  # 0: it was done already
VARIANTS: dict[str, dict[str, Any]] = {
    "waiting": {"async_save": False, "save_every": 1, "keep_checkpoints": 1},
    "meanwhile": {"async_save": True, "save_every": 1, "keep_checkpoints": 2},
    "lora": {"async_save": True, "save_every": 2, "keep_checkpoints": 1, "lora": {"rank": 2}, "train": []},
}
Kills = Mapping[int, signal.Signals]


class _Run:
    """A micro run in a folder of its own, and what it leaves when nothing disturbs it."""

    def __init__(self, folder: Path, changes: Mapping[str, Any]) -> None:
        (folder / "texts.jsonl").write_text("".join(f'{{"text": "some words {n}"}}\n' for n in range(8)))
        asked = [{"image_path": "", "question": "Is it?", "question_id": "0", "gt_answers": "yes"}]
        (folder / "a.json").write_text(json.dumps(asked))
        benchmark = {"benchmark": "vsr_val", "annotations": str(folder / "a.json"), "images": str(folder)}
        self.document = {
            **trial.TRAIN,
            "model": {**trial.TRAIN["model"], "conversation": "sphinx_v1"},
            "data_root": str(folder),
            "evaluate_every": 2,
            "evaluate": {"data": trial.TRAIN["data"], "num_batches": 1, "benchmarks": {"one": benchmark}},
            **changes,
        }
        self.out, self.log, self.exported = folder / "out", folder / "log", folder / "exported"
        self.work = trial.command("train", folder / "train.yaml")
        (folder / "train.yaml").write_text(json.dumps({**self.document, "output": str(self.out)}))
        kept = folder / "kept"
        sphinxkit.train({**self.document, "output": str(kept), "keep_checkpoints": 99})  # imports all that a fork uses
        self.weights = {step: self.export(kept, step) for step in saved_steps(kept / "checkpoints")}
        self.num_events = trial.count_events(self.work, self.log, self.out)
        self.wanted = self.result()
        assert self.wanted["steps"]

    def export(self, folder: Path, step: int) -> dict[str, str]:
        """Hashes of the weights of a checkpoint."""
        shutil.rmtree(self.exported, ignore_errors=True)
        return trial.content(sphinxkit.export(folder, self.exported, step=step))

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_log(self.out)]

    def result(self) -> dict[str, Any]:
        """All that a run leaves; the contents where they do not tell the time."""
        names = ("model", "adapter", "loss.png")
        return {
            "steps": self.losses(),
            "evaluations": read_log(self.out, EVALUATIONS_FILE),
            "contents": {name: trial.content(self.out / name) for name in names},
            "names": sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*")),
        }

    def check_stopped(self, code: int, which: signal.Signals, where: str) -> None:
        """A run was stopped: what it leaves is sound, and little work is lost."""
        steps, logged = saved_steps(self.out / "checkpoints"), len(self.losses())
        for step in steps:
            assert self.export(self.out, step) == self.weights.get(step, self.export(self.out, step)), where
        lost = logged - (steps[-1] if steps else 0)
        is_asynchronous = bool(self.document["async_save"])
        assert lost <= self.document["save_every"] * (1 + is_asynchronous), where
        if which != signal.SIGKILL:
            assert code in STOPPED[which], where
            assert lost == 0 or "interrupted" not in self.log.read_text(), where  # the signal came before the run began
            assert not trial.leftovers(self.out), where
            assert not list((self.out / "checkpoints").glob(".*")) or lost, where

    def check_end(self, where: str) -> None:
        """Start it again: it ends as if nothing had been."""
        assert trial.run(self.work, self.log) == 0, where + self.log.read_text()
        assert self.result() == self.wanted, where


@pytest.fixture(params=sorted(VARIANTS))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> _Run:
    torch.set_num_threads(1)
    return _Run(tmp_path, VARIANTS[request.param])


def _kill(run: _Run, kills: Kills, counts: Counter[str]) -> str:
    """Run until a kill; what happened, for messages."""
    code = trial.kill_at_event(run.work, run.log, run.out, kills)
    last = list(kills.values())[-1 if code == -signal.SIGKILL else 0]
    where = f"{dict(kills)} of {run.num_events}, ended with {code}: {run.log.read_text()[-3000:]}"
    counts[last.name if code else "ran to its end"] += 1
    run.check_stopped(code, last if code else signal.SIGKILL, where)
    return where


def test_killed_once(run: _Run) -> None:
    rng = random.Random(SEED)
    counts: Counter[str] = Counter()
    places = sorted(rng.sample(range(1, run.num_events + 1), min(NUM_PLACES, run.num_events)))
    plan = [(place, signal.SIGKILL) for place in places]
    plan += [(place, which) for place in places[::4] for which in (signal.SIGTERM, signal.SIGINT)]
    for place, which in plan:
        shutil.rmtree(run.out)
        run.check_end(_kill(run, {place: which}, counts))
    trial.say(counts, f"train, {run.num_events} places")


def test_killed_again_and_again(run: _Run) -> None:
    """Killed up to six times, also where a batch system asks first (SIGTERM) and kills later."""
    rng = random.Random(SEED)
    counts: Counter[str] = Counter()
    for _ in range(NUM_CHAINS):
        shutil.rmtree(run.out)
        where = ""
        for _ in range(rng.randrange(2, 7)):
            place = rng.randrange(1, run.num_events // 2)
            kills = {place: signal.SIGKILL}
            if rng.random() < 0.5:
                kills = {place: signal.SIGTERM, place + rng.randrange(1, 20): signal.SIGKILL}
            where += _kill(run, kills, counts)
        run.check_end(where)
    trial.say(counts, f"train, {NUM_CHAINS} chains")


def test_killed_when_all_steps_were_done(run: _Run) -> None:
    """Starting a finished run again replaces its model."""
    counts: Counter[str] = Counter()
    for place in range(1, trial.count_events(run.work, run.log, run.out) + 1):
        run.check_end(_kill(run, {place: signal.SIGKILL}, counts))
    trial.say(counts, "train, after the last step")


def test_killed_at_any_time(run: _Run) -> None:
    rng = random.Random(SEED)
    counts: Counter[str] = Counter()
    for _ in range(NUM_TIMED):
        shutil.rmtree(run.out, ignore_errors=True)
        code = trial.kill_after(run.work, run.log, rng.uniform(0, 2), signal.SIGKILL)
        counts["SIGKILL" if code else "ran to its end"] += 1
        run.check_stopped(code, signal.SIGKILL, f"ended with {code}")
        run.check_end(f"ended with {code}")
    trial.say(counts, "train, at a random time")
