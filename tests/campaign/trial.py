"""What the campaigns share: work in a process of its own that is killed at a chosen point, and what a folder holds."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sphinxkit.atomic import TEMP_SUFFIX
from sphinxkit.cli import main
from sphinxkit.errors import SphinxkitError

FILE_EVENTS = ("open", "os.", "shutil.", "ctypes.dlsym")
"""Audit events at which a process is killed: whatever touches files."""
MAX_MESSAGE = 50_000  # characters of an error: more is not read
LLM = {"type": "llama", "vocab_size": 512, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}

TRAIN: dict[str, Any] = {
    "kind": "train",
    "model": {"kind": "model", "llm": LLM},
    "tokenizer": str(Path(__file__).parents[2] / "recipes" / "sphinx_micro.model"),
    "data": {"texts": {"mixture": {"sources": [{"path": "texts.jsonl", "type": "text"}]}, "batch_size": 2}},
    **{"train": ["llm"], "dtype": "float32", "device": "cpu", "num_workers": 0, "save_every": 3, "keep_checkpoints": 2},
}

Work = Callable[[], object]


def command(*arguments: object) -> Work:
    """A command line of sphinxkit."""

    def run() -> None:
        sys.argv = ["sphinxkit", *map(str, arguments)]
        main()

    return run


def start(work: Work, log: Path, before: Work = lambda: None) -> int:
    """Run ``work`` in a forked process; what it prints goes to ``log``. Returns its process id."""
    torch.set_num_threads(1)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w") for _ in range(2))
        before()
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def end(process: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(work: Work, log: Path) -> int:
    """Run ``work`` to its end."""
    return end(start(work, log))


def count_events(work: Work, log: Path, below: Path) -> int:
    """Run ``work`` to its end; how many file events it has that name something below a folder."""
    place = log.with_suffix(".count")
    counted = [0]

    def before() -> None:
        at_event(below, lambda: counted.__setitem__(0, counted[0] + 1))

    def counting() -> None:
        try:
            work()
        finally:
            place.write_text(str(counted[0]))

    code = end(start(counting, log, before))
    assert code == 0, log.read_text()
    return int(place.read_text())


def kill_at_event(work: Work, log: Path, below: Path, number: int, which: signal.Signals) -> int:
    """Run ``work``, which gets the signal before its file event ``number``; its exit code."""
    left = [number]

    def reached() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), which)

    return end(start(work, log, lambda: at_event(below, reached)))


def kill_after(work: Work, log: Path, seconds: float, which: signal.Signals) -> int:
    """Run ``work``, which gets the signal after some time; its exit code."""
    process = start(work, log)
    time.sleep(seconds)
    os.kill(process, which)  # not waited for yet, so the id is still its own
    return end(process)


def at_event(below: Path, reached: Work) -> None:
    """Call ``reached`` at every audit event of this process that names something below a folder."""
    place = str(below)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FILE_EVENTS) and (
            any(isinstance(each, str | Path) and str(each).startswith(place) for each in arguments)
            or event == "ctypes.dlsym"
        ):
            reached()

    sys.addaudithook(hook)


def content(path: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Name -> hash of every file below a folder, or of one file; empty where there is none."""
    files = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
    return {
        str(each.relative_to(path.parent)): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in files
        if each.name not in skip
    }


def leftovers(folder: Path) -> list[str]:
    """Temporary names below a folder."""
    return [str(each.relative_to(folder)) for each in folder.rglob("*") if each.name.endswith(TEMP_SUFFIX)]


def outcome(work: Work) -> str:
    """``fine``, the name of the sphinxkit error that ``work`` raises, or ``FAULT`` with the place of another one."""
    try:
        work()
    except SphinxkitError as error:
        size = len(str(error))
        return type(error).__name__ if size < MAX_MESSAGE else f"FAULT: a message of {size // 10**4}e4 characters"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(last) if "/sphinxkit/" in frame.filename), last[-1])
        return f"FAULT: {type(error).__name__}: {error}"[:200] + f" ({ours.filename}:{ours.lineno})"
    return "fine"


def shown(faults: Mapping[str, Any]) -> str:
    """One input of each fault, for the message of a failed campaign."""
    return "\n".join(f"{fault}\n    {str(example)[:1500]}" for fault, example in faults.items())


def say(counts: Mapping[str, int] | Counter[str], what: str) -> None:
    """Print the counts of a campaign (shown by ``pytest -s``, or ``-rP``)."""
    sys.stdout.write(f"\n{what}: {', '.join(f'{number} {name}' for name, number in sorted(counts.items()))}\n")
