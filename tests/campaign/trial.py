"""What the campaigns share: work in a process of its own that is killed at a chosen point, and what a folder holds."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import random
import resource
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

FILE_EVENTS = ("mkdir", "rename", "remove", "rmdir", "truncate", "chmod", "chown", "fsync")
"""Calls of ``os`` that change files, by their audit events (``fsync`` has none of its own: ``at_event`` makes one)."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MAX_MESSAGE = 50_000  # characters of an error: more is not read
LLM = {"type": "llama", "vocab_size": 512, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}

TRAIN: dict[str, Any] = {
    "kind": "train",
    "model": {"kind": "model", "llm": LLM},
    "tokenizer": str(Path(__file__).parents[2] / "recipes" / "sphinx_micro.model"),
    "data": {"texts": {"mixture": {"sources": [{"path": "texts.jsonl", "type": "text"}]}, "batch_size": 2}},
    **{"train": ["llm"], "dtype": "float32", "device": "cpu", "num_workers": 0, "save_every": 3, "keep_checkpoints": 2},
}

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**5, 10**9, 10**18, 10**40, -(10**40), 0.5, -0.0, 1e308, float("inf")),
    *(
        float("nan"),
        "",
        " ",
        "x",
        "1",
        "os:system",
        "os.path:join",
        ":",
        "a:b:c",
        "llama",
        "grid",
        "from_config",
        "\ud800",
    ),
    *("\x00", "x" * 5000, "é" * 10, "../../etc/passwd", "/dev/zero", "hf://a/b", "hf://", "nano", "~", "2020-99-99"),
    *(
        [],
        [[]],
        {},
        {"type": "llama"},
        {"type": None},
        {"type": []},
        {1: 2},
        {None: None},
        {"a": {"b": {}}},
        [1, 2],
        [1e9, 1e9],
    ),
    *([0] * 3000, {str(n): n for n in range(2000)}, "sphinx_13b", b"bytes", {"type": "os:system", "command": "true"}),
)

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


def kill_at_event(work: Work, log: Path, below: Path, kills: Mapping[int, signal.Signals]) -> int:
    """Run ``work``, which gets a signal before each of these file operations, counted from 1; its exit code."""
    reached = itertools.count(1)

    def next_one() -> None:
        which = kills.get(next(reached))
        if which is not None:
            os.kill(os.getpid(), which)

    return end(start(work, log, lambda: at_event(below, next_one)))


def kill_after(work: Work, log: Path, seconds: float, which: signal.Signals) -> int:
    """Run ``work``, which gets the signal after some time; its exit code."""
    process = start(work, log)
    time.sleep(seconds)
    os.kill(process, which)  # not waited for yet, so the id is still its own
    return end(process)


def at_event(below: Path, reached: Work) -> None:
    """Call ``reached`` before every file operation of this process that changes something below a folder."""
    place, fsync = str(below), os.fsync

    def named(path: object, folder: int = -1) -> str:
        if isinstance(path, int):
            return str(Path(f"/proc/self/fd/{path}").readlink())
        text = os.fsdecode(path) if isinstance(path, str | bytes | Path) else ""
        return text if folder < 0 else str(Path(named(folder)) / text)

    def touched(event: str, arguments: tuple[Any, ...]) -> list[str]:
        family, _, call = event.partition(".")
        if event == "open":
            return [named(arguments[0])] if isinstance(arguments[2], int) and arguments[2] & WRITING else []
        if event == "ctypes.dlsym":  # the exchange of two folders
            return [place] if arguments[1] == "renameat2" else []
        if family != "os" or call not in FILE_EVENTS:
            return []
        if call == "rename":
            return [named(path, folder) for path, folder in zip(arguments[:2], arguments[2:], strict=True)]
        return [named(arguments[0], arguments[-1] if call in ("mkdir", "remove", "rmdir") else -1)]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if any(path == place or path.startswith(f"{place}/") for path in touched(event, arguments)):
            reached()

    def audited(descriptor: int) -> None:
        sys.audit("os.fsync", descriptor)
        fsync(descriptor)

    os.fsync = audited
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


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of a document and of everything in it."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += nodes(each, (*path, key))
    return found


def damaged(document: Any, rng: random.Random) -> Any:
    """A document with up to three changes to its keys and values."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(nodes(document)[1:] or [()])
        if not path:
            return rng.choice(ODD)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]] * rng.choice((1, 2, 1000))
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice((f"{key}s", "", 1, None, "type", "weights", str(key).upper()))] = holder.pop(key)
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] *= rng.choice((-1, 0, 2, 1000, 1e9, 10**9, 10**30, 0.5))
        else:
            holder[key] = rng.choice(ODD)
    return document


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(1, 40)]
        else:
            data[place] = rng.randrange(256)
        if not data:
            break
    return bytes(data)


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
