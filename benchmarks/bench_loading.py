"""Loading SPHINX-Tiny (3.1 B parameters, two released-style shards) into bf16: time, disk, peak memory.

Peak memory is that of anonymous pages (RssAnon) in a process of its own, imports left out; ``peak / weights`` is what
the design bounds by 1.1.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import released_layout
from benchmarks.ceilings import drop_page_cache
from benchmarks.harness import Case, Context, Sample, Timer, Work
from benchmarks.process import in_fresh_process

USES_DISK = True
QUICK = True
# Plain ways, and how many times the weights they hold at once: the model and the merged copy, and the shards unless
# those are mapped. With less memory free than that and SPARE_BYTES they are skipped.
PLAIN = {
    "torch.load + load_state_dict": ("load_plain", 3.2),
    "torch.load(mmap=True) + load_state_dict": ("load_mapped", 2.1),
}
SPARE_BYTES = 2e9


def cases(context: Context) -> Iterator[Case]:
    if context.quick:
        yield from _quick(context)
        return
    folder = context.scratch / "released"
    if context.micro:
        shutil.copytree(released_layout.GOLDEN / "llama_ens_light", folder)
        weights = sum(file.stat().st_size for file in folder.glob("*.pth"))
    else:
        needed = 11e9  # 6.2 GB of weights, the encoders' 4 GB in both shards
        free = shutil.disk_usage(context.scratch).free
        if free < needed:
            yield Case(
                "sphinx_tiny", skip=f"{free / 1e9:.0f} GB free in {context.scratch}, {needed / 1e9:.0f} GB needed"
            )
            return
        weights = released_layout.write_layout(folder)
    files = sorted(folder.glob("*.pth"))
    on_disk = sum(file.stat().st_size for file in files)
    for cold in (True, False):
        candidates = {"sphinxkit": _candidate("load_ours", folder, context, cold)}
        skipped = {}
        for name, (function, copies) in PLAIN.items():
            reason = _too_large(copies * weights + SPARE_BYTES)
            if reason:
                skipped[name] = reason
            else:
                candidates[name] = _candidate(function, folder, context, cold)
        yield Case(
            f"sphinx_tiny, {len(files)} shards of {on_disk / 1e9:.3g} GB, bfloat16, {'cold' if cold else 'warm'} cache",
            candidates,
            Work(
                read_bytes=weights,
                write_bytes=weights,
                disk_read_bytes=weights if cold else 0,  # replicas in the other shards need not be read
                dtype=torch.bfloat16,
            ),
            amount=weights,
            unit="bytes",
            tolerance=0,
            repeats=2,
            max_seconds=240,
        )
        for name, reason in skipped.items():
            yield Case(f"{name}, {'cold' if cold else 'warm'}", skip=reason)
    shutil.rmtree(folder)


def _quick(context: Context) -> Iterator[Case]:
    """A LLaMA of 0.13 GB in sphinxkit's own format, in this process."""
    from benchmarks.bench_interpolation import QUICK_SHAPE, RandomModel
    from sphinxkit import checkpoint

    folder = context.scratch / "llama"
    checkpoint.save(folder, RandomModel(QUICK_SHAPE, seed=0), format="sphinxkit", recipe=QUICK_SHAPE.recipe())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for cold in (True, False):

        def candidate(function: str, cold: bool = cold) -> Callable[[], Sample]:
            def call() -> Sample:
                for file in folder.glob("*.safetensors"):
                    drop_page_cache(file) if cold else _touch(file)
                sample = in_fresh_process(
                    f"benchmarks.bench_loading:{function}", fresh=False, path=str(folder), device=context.device.type
                )
                return dataclasses.replace(sample, output=torch.tensor(sample.extra["checksum"]), extra={})

            return call

        yield Case(
            f"LLaMA of {size / 1e9:.2f} GB, bfloat16, {'cold' if cold else 'warm'} cache",
            {
                "sphinxkit": candidate("load_ours"),
                "sphinxkit, checksums not compared": candidate("load_unverified"),
                "load_file + load_state_dict": candidate("load_safetensors"),
            },
            Work(read_bytes=size, write_bytes=size, disk_read_bytes=size if cold else 0, dtype=torch.bfloat16),
            amount=size,
            unit="bytes",
            tolerance=0,
        )
    shutil.rmtree(folder)


def _too_large(needed: float) -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return ""
    [available] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return f"needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} are free" if available < needed else ""


def _candidate(function: str, folder: Path, context: Context, cold: bool) -> Callable[[], Sample]:
    def call() -> Sample:
        for file in folder.glob("*.pth"):
            if cold:
                drop_page_cache(file)
            else:
                file.read_bytes() if context.micro else _touch(file)
        sample = in_fresh_process(
            f"benchmarks.bench_loading:{function}",
            timeout=600,
            fresh=not context.micro,
            path=str(folder),
            device=context.device.type,
        )
        extra = dict(sample.extra)
        checksum = extra.pop("checksum")
        if sample.peak_bytes is not None:
            extra["peak / weights"] = sample.peak_bytes / extra["weights_bytes"]
        return dataclasses.replace(sample, output=torch.tensor(checksum), extra=extra)

    return call


def _touch(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(8 * 2**20)
        while stream.readinto(buffer):
            pass


def _facts(model: torch.nn.Module, timer: Timer) -> Sample:
    # every 997th value, so that looking costs no memory that would count as the loader's
    parts = [parameter.detach().flatten()[::997].double().sum().item() for parameter in model.parameters()]
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Sample(timer.seconds, extra={"checksum": parts, "weights_bytes": size}, cpu_seconds=timer.cpu_seconds)


def load_ours_setup(path: str, device: str) -> None:
    """Import outside the clock."""
    import open_clip  # noqa: F401
    import timm  # noqa: F401

    import sphinxkit.recipe  # noqa: F401

    if device == "cuda":
        torch.zeros(1, device=device)


def load_ours(path: str, device: str) -> Sample:
    """``sphinxkit.load``."""
    import sphinxkit

    with Timer(torch.device(device)) as timer:
        model = sphinxkit.load(path, device=device, dtype=torch.bfloat16)
    return _facts(model, timer)


load_plain_setup = load_ours_setup


def load_plain(path: str, device: str) -> Sample:
    """Build the model, read every shard whole, merge, ``load_state_dict``: what the public code's steps amount to."""
    return _load_plain(path, device, mmap=False)


load_mapped_setup = load_ours_setup


def load_mapped(path: str, device: str) -> Sample:
    """The same, with the shards mapped instead of read."""
    return _load_plain(path, device, mmap=True)


def load_unverified(path: str, device: str) -> Sample:
    """``sphinxkit.load`` without comparing checksums."""
    import sphinxkit

    with Timer(torch.device(device)) as timer:
        model = sphinxkit.load(path, device=device, dtype=torch.bfloat16, verify=False)
    return _facts(model, timer)


def load_safetensors(path: str, device: str) -> Sample:
    """Build the model, read every file whole, ``load_state_dict``."""
    from safetensors.torch import load_file

    import sphinxkit
    from sphinxkit import checkpoint

    with checkpoint.open(path) as source:
        recipe: Any = source.recipe
    with Timer(torch.device(device)) as timer:
        model = sphinxkit.build(recipe, device="meta", dtype=torch.bfloat16).to_empty(device=device)
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            tensors |= load_file(file, device=device)
        model.load_state_dict(tensors)
    return _facts(model, timer)


def _load_plain(path: str, device: str, mmap: bool) -> Sample:
    import sphinxkit
    from sphinxkit import checkpoint
    from sphinxkit.checkpoint.formats.released import sphinx_key_map

    with checkpoint.open(path) as source:
        recipe: Any = source.recipe
    with Timer(torch.device(device)) as timer:
        model = sphinxkit.build(recipe, device="cpu", dtype=torch.bfloat16)
        shards = [torch.load(file, weights_only=True, mmap=mmap)["model"] for file in sorted(Path(path).glob("*.pth"))]
        names = sphinx_key_map(recipe["vision"])
        wanted, merged = model.state_dict(), {}
        for name in shards[0]:
            found = names.to_ours(name)
            if found is None or names.is_unused(name) or found[0] not in wanted:
                continue
            parts, target = [shard[name] for shard in shards], wanted[found[0]]
            split = [dim for dim in range(target.ndim) if parts[0].shape[dim] != target.shape[dim]]
            merged[found[0]] = torch.cat(parts, split[0]) if split else parts[0]
        model.load_state_dict(merged)
        model.to(device)
    return _facts(model, timer)
