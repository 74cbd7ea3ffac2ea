"""Where a run takes place: machine, versions, commit, load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
PACKAGES = ["torch", "torchvision", "timm", "open_clip_torch", "transformers", "xformers", "safetensors", "pillow"]


def git_commit() -> str:
    """Short hash of the checkout that the benchmarks lie in; "" outside of one."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads and system; the GPU too where the run is on one."""
    cpu = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found.group(1) if found else cpu
        memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()).group(1)) * 1024  # type: ignore[union-attr]
    except OSError:
        memory = 0
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def versions() -> dict[str, str]:
    """Of Python, this package and those beside it that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    import sphinxkit

    found = {"python": platform.python_version(), "sphinxkit": sphinxkit.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def load() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2)
