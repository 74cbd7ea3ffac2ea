"""Two writers of one target: one writes it and the other is refused; never a mixture, never both in silence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import sphinxkit
from tests.campaign import trial

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]
NUM_ROUNDS = 30
NUM_CONTAINERS = 3
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        sphinxkit.build({"kind": "model", "llm": trial.LLM}).save(folder / name)
    return folder


def judged(codes: tuple[int, int], target: Path, wanted: list[dict[str, str]], counts: Counter[str]) -> None:
    """Exit codes and target of a round: new targets are written once, the other writer is refused."""
    assert trial.content(target) in wanted, codes
    assert sorted(codes) == [0, 1], codes
    assert not trial.leftovers(target.parent)
    counts["one written, one refused"] += 1


def test_two_conversions_to_one_new_target(models: Path, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    target = tmp_path / "out" / "new"
    wanted = []
    for name in ("one", "two"):
        sphinxkit.convert(models / name, target)
        wanted.append(trial.content(target))
        shutil.rmtree(target)
    assert wanted[0] != wanted[1]
    works = [trial.command("convert", models / name, "-o", target) for name in ("one", "two")]
    for number in range(NUM_ROUNDS):
        logs = [tmp_path / f"log-{which}" for which in range(2)]
        started = [trial.start(works[(which + number) % 2], logs[which]) for which in range(2)]
        first, second = (trial.end(process) for process in started)
        said = "".join(log.read_text() for log in logs)
        assert "another process is writing it" in said or "exists already" in said, said
        judged((first, second), target, wanted, counts)
        shutil.rmtree(target)
    trial.say(counts, "two conversions to one new target")


def test_two_containers(models: Path, tmp_path: Path) -> None:
    """Two process-id namespaces, where both writers have the same small process ids."""
    try:
        can_unshare = not subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode
    except FileNotFoundError:
        can_unshare = False
    if not can_unshare:
        pytest.skip("needs unshare and the right to use it")
    counts: Counter[str] = Counter()
    target = tmp_path / "out" / "new"
    wanted = []
    for name in ("one", "two"):
        sphinxkit.convert(models / name, target)
        wanted.append(trial.content(target))
        shutil.rmtree(target)
    for _ in range(NUM_CONTAINERS):
        processes = [
            subprocess.Popen([*UNSHARE, sys.executable, "-m", "sphinxkit", "convert", models / name, "-o", target])
            for name in ("one", "two")
        ]
        first, second = (process.wait() for process in processes)
        judged((first, second), target, wanted, counts)
        shutil.rmtree(target)
    trial.say(counts, "two containers, one new target")
