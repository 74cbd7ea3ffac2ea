"""Run one candidate in a process of its own, and watch its anonymous memory.

Peak memory can only be told apart from what the benchmark itself holds when the candidate runs alone.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness import Sample

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.005  # our choice: a gigabyte takes longer than this to touch


def rss_anon() -> int | None:
    """Anonymous resident memory of this process in bytes (Linux), or None where the kernel does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class PeakMemory:
    """Context manager that samples RssAnon in a thread: ``.before`` and ``.peak``, in bytes (None: unknown)."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = rss_anon()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        now = rss_anon()
        if now is not None and self.peak is not None:
            self.peak = max(self.peak, now)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._sample()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    @property
    def grown(self) -> int | None:
        """Peak above the level at the start."""
        return None if self.peak is None or self.before is None else self.peak - self.before


def in_fresh_process(
    target: str, timeout: float = 3600, threads: int | None = None, fresh: bool = True, **options: Any
) -> Sample:
    """Call ``package.module:function(**options)`` in a new interpreter; its time and peak memory, imports left out.

    The function may return a Sample (its own time counts), a dict (goes to ``extra``), or anything else (dropped).
    A function whose module has an attribute ``<function>_setup`` gets it called first, outside time and memory.

    Args:
        target: What to call. Its module is imported before the clock starts.
        timeout: Seconds after which the child is killed.
        threads: ``torch.set_num_threads`` in the child; None: the parent's setting.
        fresh: False calls the function in this process: for micro runs, where a child's imports would take seconds.
        options: JSON-serialisable keyword arguments.
    Raises:
        RuntimeError: The child failed; the message holds the end of what it wrote.
    """
    import torch

    if not fresh:
        return Sample(**_measured(target, options))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = {"target": target, "options": options, "result": str(result)}
        request["threads"] = threads or torch.get_num_threads()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.process", json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
        if done.returncode or not result.exists():
            raise RuntimeError(f"{target} exited with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        answer = json.loads(result.read_text())
    return Sample(**answer)


def _measured(target: str, options: dict[str, Any]) -> dict[str, Any]:
    module_name, _, name = target.partition(":")
    module = importlib.import_module(module_name)
    setup = getattr(module, f"{name}_setup", None)
    if setup is not None:
        setup(**options)
    with PeakMemory() as memory:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        value = getattr(module, name)(**options)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    extra: dict[str, Any] = {}
    if isinstance(value, Sample):
        seconds, cpu_seconds, extra = value.seconds, value.cpu_seconds, value.extra
    elif isinstance(value, dict):
        extra = value
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": memory.grown, "extra": extra}


def _child(request: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(request["threads"])
    Path(request["result"]).write_text(json.dumps(_measured(request["target"], request["options"])))


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
