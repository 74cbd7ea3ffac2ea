"""Start-up: processor time of a whole process, from nothing to SPHINX-nano's answer, against ``import torch`` alone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.harness import FOLDER, Case, Context, Sample, Work

QUICK = True
DEVICES = ("cpu",)


def process(*arguments: str) -> Callable[[], Sample]:
    """A candidate that runs Python with these arguments; its time is the process's user and system time."""

    def run() -> Sample:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment.pop("OMP_NUM_THREADS", None)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Sample(spent, extra={"wall": time.perf_counter() - start})

    return run


def cases(context: Context) -> Iterator[Case]:
    picture = str(FOLDER.parent / "docs" / "images" / "nano_scene.png")
    question = ("-m", "sphinxkit", "generate", "--image", picture, "--prompt", "How many circles are there?")
    count = ("-m", "sphinxkit", "memory", "sphinx_1k_13b", "--batch-size", "8")
    for name, ours in (("an answer of SPHINX-nano", question), ("the memory of SPHINX-1k 13B, counted", count)):
        commands = {"sphinxkit": ours, "import torch": ("-c", "import torch")}
        candidates = {
            each: process(*context.pick(command, ("-c", "pass"), command)) for each, command in commands.items()
        }
        yield Case(name, candidates, Work(), repeats=5, note="user and system time of the whole process")
