from __future__ import annotations

import mmap
import sys
import time

import pytest

from benchmarks.process import POLL_SECONDS, PeakMemory, in_fresh_process, rss_anon

MEGABYTE = 2**20
SLACK = 16 * MEGABYTE  # the interpreter's own allocations, the allocator's rounding

linux = pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")


@linux
def test_peak_memory_sees_what_is_freed_again() -> None:
    # mapped, as malloc may have memory left that another test freed
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with PeakMemory() as memory, mmap.mmap(-1, 64 * MEGABYTE, flags=private) as data:
        for _ in range(64):
            data.write(b"1" * MEGABYTE)
        time.sleep(20 * POLL_SECONDS)
    assert memory.grown is not None
    assert 63 * MEGABYTE < memory.grown < 64 * MEGABYTE + SLACK


@linux
def test_rss_anon_is_plausible() -> None:
    value = rss_anon()
    assert value is not None
    assert 10 * MEGABYTE < value < 64 * 2**30


def test_in_fresh_process_returns_time_and_facts() -> None:
    sample = in_fresh_process("json:loads", s='{"answer": 42}')
    assert sample.extra == {"answer": 42}
    assert 0 < sample.seconds < 1
    if sys.platform == "linux":
        assert sample.peak_bytes is not None
        assert sample.peak_bytes < SLACK


@pytest.mark.slow
def test_in_fresh_process_reports_the_childs_error() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)json:loads exited with 1: .*JSONDecodeError"):
        in_fresh_process("json:loads", s="{")
