"""Kills: nothing is lost or half-written, signals clean up, and the next run clears what a killed one left."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from tests.campaign import trial

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]
NUM_PLACES = 40  # kills before a file operation, for each command; all where there are no more
NUM_TIMED = 8  # kills at a random time, for each command
SEED = 2311
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
Kill = tuple[int | None, float, signal.Signals]
"""File operation, or else the time after which the signal comes."""
STOPPED = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, 0), signal.SIGINT: (130, 0)}  # 0: it was done already


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small language models, and another tuned one."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        sphinxkit.build({"kind": "model", "llm": trial.LLM}).save(folder / name)
    sphinxkit.extract_delta(folder / "one", folder / "two", folder / "delta", dtype=torch.float32)
    turns = [{"from": "human", "value": "<image>\nWhat is it? " * 3}, {"from": "gpt", "value": "a bus"}]
    records: list[object] = [
        {"id": str(index), "image": f"{index}.jpg", "conversations": turns} for index in range(300)
    ]
    (folder / "in.json").write_text(json.dumps([*records, {"id": "bad"}]))
    rows = [{"id": index, "prompt": f"How many? {index}", "max_new_tokens": 4} for index in range(30)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def work_of(name: str, models: Path, out: Path) -> trial.Work:
    one, two = models / "one", models / "two"
    lines: dict[str, tuple[object, ...]] = {
        "convert": ("convert", one, "-o", out / "new", "--overwrite"),
        "convert_to_shards": ("convert", one, "-o", out / "new", "--to", "meta", "--part", "llm", "--overwrite"),
        "convert_to_hf": ("convert", one, "-o", out / "new", "--to", "hf", "--overwrite"),
        "mix": ("mix", one, two, "--beta", 0.5, "-o", out / "new", "--overwrite"),
        "extract_delta": ("delta", "extract", one, two, "-o", out / "new", "--overwrite"),
        "apply_delta": ("delta", "apply", one, models / "delta", "-o", out / "new", "--overwrite"),
        "convert_data": ("convert-data", models / "in.json", "--format", "llava", "-o", out / "new.jsonl"),
        "generate": ("generate", "nano", "--input", models / "in.jsonl", "-o", out / "new.jsonl", "--dtype", "float32"),
    }
    if name == "save":
        return lambda: sphinxkit.load(str(one)).save(out / "new", overwrite=True)
    return trial.command(*lines[name], *(["--accelerate", "none", "--device", "cpu"] if name == "generate" else []))


def planned(num_events: int, seconds: float, signals: Sequence[signal.Signals]) -> list[Kill]:
    """Kills spread over the file operations of a run, the signals in turn, and some at random times."""
    rng = random.Random(SEED)
    places = sorted(rng.sample(range(1, num_events + 1), min(NUM_PLACES, num_events)))
    plan: list[Kill] = [(number, 0.0, signals[index % len(signals)]) for index, number in enumerate(places)]
    return plan + [(None, rng.uniform(0.1, 1.1) * seconds, rng.choice(signals)) for _ in range(NUM_TIMED)]


FOLDERS = ("save", "convert", "convert_to_shards", "convert_to_hf", "mix", "extract_delta", "apply_delta")


@pytest.mark.parametrize("before", ["nothing", "another"])
@pytest.mark.parametrize("name", [*FOLDERS, "convert_data"])
def test_killed_writer(name: str, before: str, models: Path, tmp_path: Path) -> None:
    """A target is what it was or what it should become; inputs stay; the next run ends well and leaves nothing else."""
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    work = work_of(name, models, out)
    inputs = trial.content(models)
    target = out / ("new.jsonl" if name == "convert_data" else "new")

    def reset() -> None:
        shutil.rmtree(out)
        out.mkdir()
        if before == "another" and target.suffix:
            target.write_text("another\n")
        elif before == "another":
            shutil.copytree(models / "two", target)

    reset()
    old = trial.content(target)
    started = time.perf_counter()
    num_events = trial.count_events(work, log, out)
    seconds = time.perf_counter() - started
    new = trial.content(target, ("provenance.json",))
    assert new
    assert new != old
    signals = SIGNALS if name != "save" else (signal.SIGKILL, signal.SIGINT)  # Python's own way with SIGTERM is to end
    counts: Counter[str] = Counter()
    for number, delay, which in planned(num_events, seconds, signals):
        reset()
        if number is not None:
            code = trial.kill_at_event(work, log, out, {number: which})
        else:
            code = trial.kill_after(work, log, delay, which)
        where = f"{which.name} at {number or delay} of {num_events}, ended with {code}: {log.read_text()[-2000:]}"
        assert code in (STOPPED[which] if number is not None else (*STOPPED[which], 0, -which)), where
        if which != signal.SIGKILL and code != -which:
            assert not trial.leftovers(out), where
        counts[which.name] += 1
        left = trial.content(target, ("provenance.json",))
        assert left in (old, new), where
        if not target.suffix and target.exists():
            with checkpoint.open(target, delta=name == "extract_delta" and left == new) as opened:
                assert list(opened.keys()), where
        counts["done" if left == new else "as before"] += 1
        counts["left temporary files"] += bool(trial.leftovers(out))
        assert trial.run(work, log) == 0, where + log.read_text()
        assert trial.content(target, ("provenance.json",)) == new, where
        assert not trial.leftovers(out), where
    assert trial.content(models) == inputs
    trial.say(counts, f"{name} over {before}")


def test_killed_answers(models: Path, tmp_path: Path) -> None:
    """Rows that were answered stay; a run that is started again gives the file of an undisturbed run."""
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    work = work_of("generate", models, out)
    started = time.perf_counter()
    num_events = trial.count_events(work, log, out)
    seconds = time.perf_counter() - started
    wanted = trial.content(out)
    counts: Counter[str] = Counter()
    for number, delay, which in planned(num_events, seconds, SIGNALS):
        shutil.rmtree(out)
        out.mkdir()
        if number is not None:
            code = trial.kill_at_event(work, log, out, {number: which})
        else:
            code = trial.kill_after(work, log, delay, which)
        where = f"{which.name} at {number or delay} of {num_events}, ended with {code}: {log.read_text()[-2000:]}"
        assert code in (*STOPPED[which], 0, -which), where
        if which != signal.SIGKILL and code != -which:
            assert not trial.leftovers(out), where
        rows = sum(path.read_bytes().count(b"\n") for path in out.glob("new.jsonl*"))
        counts[which.name] += 1
        counts["rows kept"] += rows
        assert trial.run(work, log) == 0, where + log.read_text()
        assert trial.content(out) == wanted, where
    trial.say(counts, "generate --input")
