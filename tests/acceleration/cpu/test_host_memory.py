"""Memory that is freed is not asked for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from sphinxkit.acceleration.cpu.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
before = faults()
for _ in range(8):
    torch.ones(16 << 20)  # 64 MiB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True)
        return int(found.stdout)

    assert faults("keep") < faults("leave") / 4
