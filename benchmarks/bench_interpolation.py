"""Mixing two 2 GB bf16 models on disk: against the disk's copy speed, loading it all, and mergekit; peak memory.

``disk copy`` copies one of the models (read, write, flush): a mix reads twice as much and writes the same, so 1.0 times
its speed is the floor wherever writing is the slower half. mergekit runs from its own environment: its
``mergekit-yaml`` is looked for in ``$SPHINXKIT_MERGEKIT`` and on the path. Peak memory is that of anonymous pages
(RssAnon) in a process of its own, imports left out (mergekit: of the whole process).
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ceilings import drop_page_cache, read_through
from benchmarks.harness import Case, Context, Sample, Work
from benchmarks.process import POLL_SECONDS, in_fresh_process

DEVICES = ("cpu",)
USES_DISK = True
QUICK = True
BETA = 0.5
CHECKED = "llm.norm.weight"  # a tensor that every run's result is looked at by
SPARE_BYTES = 5e9
BIG_SECONDS = 600  # for writing 20 GB on a slow disk; the case is skipped when less time is left


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA's numbers."""

    num_layers: int
    embed_dim: int
    hidden_dim: int
    vocab_size: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape."""
        dim, hidden = self.embed_dim, self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {"llm.embed_tokens.weight": (self.vocab_size, dim)}
        for layer in range(self.num_layers):
            start = f"llm.layers.{layer}."
            shapes |= {f"{start}attention.{name}_proj.weight": (dim, dim) for name in "qkvo"}
            shapes |= {f"{start}attention_norm.weight": (dim,), f"{start}mlp_norm.weight": (dim,)}
            shapes |= {f"{start}mlp.{name}_proj.weight": (hidden, dim) for name in ("gate", "up")}
            shapes[f"{start}mlp.down_proj.weight"] = (dim, hidden)
        return {**shapes, CHECKED: (dim,), "llm.lm_head.weight": (self.vocab_size, dim)}

    def recipe(self) -> dict[str, object]:
        """What the checkpoint says about itself."""
        numbers = {"type": "llama", "num_heads": 16, **dataclasses.asdict(self)}
        return {"kind": "model", "llm": numbers, "conversation": "sphinx_v1"}


FULL = Shape(18, 2048, 5632, 32000)  # 1.06 B parameters
BIG = Shape(36, 4096, 16384, 32000)  # 20 GB; its files are holes and take no room on the disk
QUICK_SHAPE = Shape(4, 1024, 2816, 8000)  # 0.13 GB
MICRO = Shape(2, 64, 128, 100)


class RandomModel:
    """A tensor source of random bf16 values, made one at a time."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shapes = shape.tensors()
        self._generator = torch.Generator().manual_seed(seed)

    def keys(self) -> list[str]:
        """Names, in order."""
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """bfloat16."""
        return torch.bfloat16

    def read(self, key: str) -> Tensor:
        """One tensor, drawn now."""
        return torch.randn(self._shapes[key], generator=self._generator).mul_(0.02).bfloat16()


def cases(context: Context) -> Iterator[Case]:
    from sphinxkit import checkpoint

    shape = context.pick(FULL, MICRO, QUICK_SHAPE)
    paths = [context.scratch / name for name in ("first", "second")]
    needed = 4 * 2 * sum(torch.Size(size).numel() for size in shape.tensors().values()) + SPARE_BYTES
    free = shutil.disk_usage(context.scratch).free
    if not context.micro and free < needed:
        yield Case("two models", skip=f"{free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")
        return
    for seed, path in enumerate(paths):
        checkpoint.save(path, RandomModel(shape, seed), format="hf", recipe=shape.recipe())
    with checkpoint.open(paths[0]) as a, checkpoint.open(paths[1]) as b:
        expected = (BETA * a.read(CHECKED).float() + (1 - BETA) * b.read(CHECKED).float()).bfloat16()
    out = context.scratch / "mixed"
    size = sum(file.stat().st_size for file in paths[0].glob("*.safetensors"))
    mergekit = find_mergekit()
    for cold in (True, False):
        here = context.size != "full"  # without a process of its own, which takes seconds to start
        candidates: dict[str, Callable[[], Sample]] = {
            "sphinxkit": _child(here, "mix_ours", paths, out, cold, expected, hash_inputs=True),
            "sphinxkit, inputs not hashed": _child(here, "mix_ours", paths, out, cold, expected, hash_inputs=False),
            "disk copy": _child(here, "copy_one", paths, out, cold, None),
            "load all, then average": _child(here, "mix_loaded", paths, out, cold, expected),
        }
        if mergekit and context.size == "full":
            candidates["mergekit"] = _run_mergekit(mergekit, paths, out, cold, expected)
        yield Case(
            f"two models of {size / 1e9:.2f} GB, bfloat16, {'cold' if cold else 'warm'} page cache",
            candidates,
            Work(disk_read_bytes=2 * size if cold else 0, disk_write_bytes=size, dtype=torch.bfloat16),
            amount=size,
            unit="bytes",
            repeats=2,
            max_seconds=150,
        )
    if not mergekit:
        yield Case("mergekit", skip="no mergekit-yaml: install it elsewhere and set SPHINXKIT_MERGEKIT to its path")
    for path in (*paths, out):
        shutil.rmtree(path, ignore_errors=True)
    if not context.quick:
        yield from _big(context)


def _big(context: Context) -> Iterator[Case]:
    shape = context.pick(BIG, MICRO)
    size = 2 * sum(torch.Size(one).numel() for one in shape.tensors().values())
    free = shutil.disk_usage(context.scratch).free
    name = f"peak memory, two models of {size / 1e9:.1f} GB (holes)"
    if not context.micro and (free < size + SPARE_BYTES or context.seconds_left < BIG_SECONDS):
        yield Case(name, skip=f"writes {size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; minutes of time, too")
        return
    paths = [context.scratch / name for name in ("hole_a", "hole_b")]
    for path in paths:
        _write_holes(path, shape)
    largest = max(2 * torch.Size(one).numel() for one in shape.tensors().values())
    samples: list[Sample] = []

    def once() -> Sample:
        if not samples:  # minutes of writing zeros say nothing new the second time
            samples.append(
                _child(context.micro, "mix_ours", paths, context.scratch / "mixed", True, None, hash_inputs=False)()
            )
        extra = {"largest_tensor_bytes": largest, "bound_bytes": 3 * largest + 300e6}
        return dataclasses.replace(samples[0], extra=extra)

    yield Case(name, {"sphinxkit": once}, Work(disk_write_bytes=size), amount=size, unit="bytes", repeats=1)
    for path in (*paths, context.scratch / "mixed"):
        shutil.rmtree(path, ignore_errors=True)


def _write_holes(folder: Path, shape: Shape) -> None:
    """A checkpoint of zeros that takes no room: the header is written, the data is a hole in the file."""
    header, position = {}, 0
    for key, size in shape.tensors().items():
        end = position + 2 * torch.Size(size).numel()
        header[key] = {"dtype": "BF16", "shape": list(size), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + position)
    facts = {"model.safetensors": {"size": file.stat().st_size}}
    metadata = {"format": "sphinxkit", "version": 1, "total_size": position, "files": facts}
    index = {"metadata": metadata, "weight_map": dict.fromkeys(header, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _prepare(paths: list[Path], out: Path, cold: bool) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for path in paths:
        for file in path.glob("*.safetensors"):
            if cold:
                drop_page_cache(file)
            else:
                read_through(file)


def _verify(out: Path, expected: Tensor | None) -> None:
    from sphinxkit import checkpoint

    if expected is not None:
        with checkpoint.open(out) as opened:
            if not torch.equal(opened.read(CHECKED), expected):
                raise ValueError(f"{out} is not the mix")


def _child(
    here: bool, function: str, paths: list[Path], out: Path, cold: bool, expected: Tensor | None, **options: object
) -> Callable[[], Sample]:
    def call() -> Sample:
        _prepare(paths, out, cold)
        places = {"first": str(paths[0]), "second": str(paths[1]), "out": str(out)}
        if here:  # a new interpreter for each call would take a dry run minutes
            begin = time.perf_counter()
            globals()[function](**places, **options)
            sample = Sample(time.perf_counter() - begin)
        else:
            sample = in_fresh_process(f"benchmarks.bench_interpolation:{function}", **places, **options)
        _verify(out, expected)
        return sample

    return call


def mix_ours_setup(first: str, second: str, out: str, hash_inputs: bool) -> None:
    """Import outside the clock."""
    from sphinxkit import checkpoint, interpolation  # noqa: F401


def mix_ours(first: str, second: str, out: str, hash_inputs: bool) -> None:
    """Stream the mix to the disk, as ``sphinxkit mix`` does."""
    from sphinxkit import checkpoint, interpolation

    with checkpoint.open(first) as a, checkpoint.open(second) as b:
        method = interpolation.create("linear")
        mixed = interpolation.MixedSource([a, b], method, (BETA, 1 - BETA), hash_inputs=hash_inputs)
        recipe = a.recipe if a.has_recipe else None
        layout = "hf" if a.format == "hf" else "sphinxkit"
        checkpoint.save(out, mixed, format=layout, recipe=recipe, checksum=False)
        mixed.input_hashes()


def copy_one(first: str, second: str, out: str) -> None:
    """Copy the first model and flush it to the disk."""
    Path(out).mkdir()
    for file in sorted(Path(first).glob("*.safetensors")):
        with file.open("rb") as source, (Path(out) / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, 16 * 2**20)
            target.flush()
            os.fsync(target.fileno())


def mix_loaded_setup(first: str, second: str, out: str) -> None:
    """Import outside the clock."""
    import safetensors.torch  # noqa: F401


def mix_loaded(first: str, second: str, out: str) -> None:
    """Load both models, average them in float32, save: the plain way."""
    from safetensors.torch import load_file, save_file

    Path(out).mkdir()
    models = []
    for path in (first, second):
        models.append({})
        for file in sorted(Path(path).glob("*.safetensors")):
            models[-1] |= load_file(file)
    mixed = {key: (BETA * models[0][key].float() + (1 - BETA) * models[1][key].float()).bfloat16() for key in models[0]}
    target = Path(out) / "model.safetensors"
    save_file(mixed, target, metadata={"format": "pt"})
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    shutil.copy(Path(first) / "config.json", out)


def find_mergekit() -> str | None:
    """The ``mergekit-yaml`` to run, if there is one."""
    return os.environ.get("SPHINXKIT_MERGEKIT") or shutil.which("mergekit-yaml")


def _run_mergekit(program: str, paths: list[Path], out: Path, cold: bool, expected: Tensor) -> Callable[[], Sample]:
    """Its command line on the same models; start-up and imports are in its time, as a user sees them."""
    weights = "".join(
        f"  - model: {path}\n    parameters: {{weight: {weight}}}\n"
        for path, weight in zip(paths, (BETA, 1 - BETA), strict=True)
    )
    config = out.parent / "mergekit.yaml"
    config.write_text(f"models:\n{weights}merge_method: linear\ndtype: bfloat16\n")

    def call() -> Sample:
        _prepare(paths, out, cold)
        begin, cpu_begin = time.perf_counter(), children_seconds()
        with (out.parent / "mergekit.log").open("w+") as log:
            # the random models have no tokenizer, without which mergekit stops unless told so
            command = [program, str(config), str(out), "--allow-crimes", "--no-copy-tokenizer"]
            process = subprocess.Popen(command, stdout=log, stderr=log)
            peak = 0
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(4 * POLL_SECONDS)
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"mergekit exited with {process.returncode}: {log.read()[-1000:]}")
        for file in out.glob("*.safetensors"):
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        seconds, cpu_seconds = time.perf_counter() - begin, children_seconds() - cpu_begin
        _verify(out, expected)
        return Sample(seconds, peak_bytes=float(peak), cpu_seconds=cpu_seconds)

    return call


def children_seconds() -> float:
    """Processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous(pid: int) -> int:
    """Anonymous resident memory of a process in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
