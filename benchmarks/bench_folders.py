"""``sphinxkit mix`` and mergekit on the same Hugging Face folders, both as commands: time, peak memory, equal results.

The models are a Qwen2 (biases, tied embedding) of random bf16 weights, taken by the names in their files, as any
folder is. mergekit runs from its own environment: ``$SPHINXKIT_MERGEKIT`` names its ``mergekit-yaml``:

    uv venv /tmp/mergekit && uv pip install --python /tmp/mergekit/bin/python mergekit==0.1.5
    SPHINXKIT_MERGEKIT=/tmp/mergekit/bin/mergekit-yaml python -m benchmarks run folders --quick --device cpu

Both compute in float32 and round once to bf16. Start-up and imports are in both times, and peak memory is the anonymous
memory of the whole process. ``more`` compares mergekit's file with ours, element by element.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_interpolation import anonymous, children_seconds, find_mergekit
from benchmarks.harness import Case, Context, Sample, Work
from benchmarks.process import POLL_SECONDS, ROOT

DEVICES = ("cpu",)
USES_DISK = True
QUICK = True
TUNING = 0.05  # how far the tuned models are from their base, relative to its weights; our choice
SAME = "equal definitions"
FUSED = (
    "equal definitions; mergekit multiplies and adds in one rounding (addcmul), we in two, so about one float32 sum in "
    "6,000 falls on the other side of a bf16 rounding; the sums that are many steps apart are next to 0"
)
CANCEL = "where two votes cancel exactly, as bf16 ones often do, mergekit keeps the positive one and we neither"


@dataclass(frozen=True)
class Method:
    """One merge method, as each program calls it.

    Attributes:
        name: Of the case.
        ours: Options of ``sphinxkit mix``.
        theirs: Lines of mergekit's YAML beside the models and their weights.
        weights: Of the two models.
        has_base: Whether the base is named to ours.
        note: Where the definitions differ.
    """

    name: str
    ours: tuple[str, ...]
    theirs: str
    weights: tuple[float, float]
    has_base: bool = False
    note: str = SAME


METHODS = (
    Method("linear", ("--weights", "0.7,0.3"), "merge_method: linear\n", (0.7, 0.3), note=FUSED),
    Method(
        "slerp",
        ("--method", "slerp", "--beta", "0.6"),
        "merge_method: slerp\nbase_model: FIRST\nparameters: {t: 0.4}\n",
        (1, 1),
        note="mergekit normalises each tensor before the product and finds the angle in float32, we in float64; it is "
        "linear above a cosine of 0.9995, we where the sine is below 1e-4",
    ),
    Method(
        "task_arithmetic",
        ("--method", "task_arithmetic", "--weights", "0.7,0.4"),
        "merge_method: task_arithmetic\nbase_model: BASE\nparameters: {normalize: false}\n",
        (0.7, 0.4),
        has_base=True,
    ),
    Method(
        "ties, density 1",
        ("--method", "ties", "--weights", "1,1", "--option", "density=1"),
        "merge_method: ties\nbase_model: BASE\nparameters: {normalize: true, density: 1.0}\n",
        (1, 1),
        has_base=True,
        note=f"{CANCEL}; elsewhere all bits are equal",
    ),
    Method(
        "ties, density 0.2",
        ("--method", "ties", "--weights", "1,1", "--option", "density=0.2"),
        "merge_method: ties\nbase_model: BASE\nparameters: {normalize: true, density: 0.2}\n",
        (1, 1),
        has_base=True,
        note=f"{CANCEL}; and of equal magnitudes at the cut we keep all, mergekit as many as the density says",
    ),
)


def config(layers: int, width: int, hidden: int, vocab: int) -> dict[str, Any]:
    """``config.json`` of a Qwen2."""
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": layers}
    sizes = {"hidden_size": width, "intermediate_size": hidden, "vocab_size": vocab, "tie_word_embeddings": True}
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **heads, **sizes, "torch_dtype": "bfloat16"}


FULL = config(12, 896, 4864, 32000)  # 0.42 GB
QUICK_CONFIG = config(4, 896, 4864, 8000)  # 0.13 GB
MICRO = config(1, 28, 32, 20)


def shapes(numbers: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of its tensors."""
    width, hidden = numbers["hidden_size"], numbers["intermediate_size"]
    keys = width // numbers["num_attention_heads"] * numbers["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (numbers["vocab_size"], width)}
    for layer in range(numbers["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        for name, rows in (("q", width), ("k", keys), ("v", keys)):
            found |= {
                f"{start}self_attn.{name}_proj.weight": (rows, width),
                f"{start}self_attn.{name}_proj.bias": (rows,),
            }
        found |= {f"{start}self_attn.o_proj.weight": (width, width), f"{start}mlp.down_proj.weight": (width, hidden)}
        found |= {f"{start}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        found |= {f"{start}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {**found, "model.norm.weight": (width,)}


def write_models(folder: Path, numbers: dict[str, Any]) -> list[Path]:
    """A base and two models tuned from it."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes(numbers).items()}
    paths = [folder / name for name in ("base", "first", "second")]
    for path in paths:
        path.mkdir()
        tuning = 0.0 if path.name == "base" else TUNING
        tensors = {
            key: tensor.add(torch.randn(tensor.shape, generator=generator), alpha=0.02 * tuning).bfloat16()
            for key, tensor in base.items()
        }
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(numbers))
    return paths


def cases(context: Context) -> Iterator[Case]:
    mergekit = find_mergekit()
    base, *models = write_models(context.scratch, context.pick(FULL, MICRO, QUICK_CONFIG))
    size = (base / "model.safetensors").stat().st_size
    for method in METHODS:
        outs = {name: context.scratch / name for name in ("ours", "theirs")}
        ours = [*map(str, models), "--output", str(outs["ours"]), "--overwrite", "--to", "safetensors", *method.ours]
        if method.has_base:
            ours += ["--base", str(base)]
        candidates: dict[str, Callable[[], Sample]] = {"sphinxkit": _in_process(ours) if context.micro else _run(
            [sys.executable, "-m", "sphinxkit", "mix", *ours], outs["ours"]
        )}  # fmt: skip
        if mergekit and not context.micro:
            text = "models:\n" + "".join(
                f"  - model: {path}\n    parameters: {{weight: {weight}}}\n"
                for path, weight in zip(models, method.weights, strict=True)
            )
            text += method.theirs.replace("BASE", str(base)).replace("FIRST", str(models[0]))
            file = context.scratch / "mergekit.yaml"
            command = [mergekit, str(file), str(outs["theirs"]), "--allow-crimes", "--no-copy-tokenizer"]
            text += "dtype: float32\nout_dtype: bfloat16\n"
            candidates["mergekit 0.1.5"] = _run(command, outs["theirs"], (file, text), outs["ours"])
        yield Case(
            f"{method.name}, models of {size / 1e9:.2f} GB",
            candidates,
            Work(disk_write_bytes=size, dtype=torch.bfloat16),
            amount=size,
            unit="bytes",
            repeats=1 if context.quick else 2,
            max_seconds=120,
            note=method.note
            if "mergekit 0.1.5" in candidates
            else "no mergekit-yaml: set SPHINXKIT_MERGEKIT to its path",
        )
    for path in (base, *models, *outs.values()):
        shutil.rmtree(path, ignore_errors=True)


def _in_process(arguments: Sequence[str]) -> Callable[[], Sample]:
    def call() -> Sample:
        from typer.testing import CliRunner

        from sphinxkit.cli import app

        begin = time.perf_counter()
        result = CliRunner().invoke(app, ["mix", *arguments])
        if result.exit_code:
            raise RuntimeError(result.output)
        return Sample(time.perf_counter() - begin)

    return call


def _run(
    command: Sequence[str], out: Path, file: tuple[Path, str] | None = None, reference: Path | None = None
) -> Callable[[], Sample]:
    def call() -> Sample:
        shutil.rmtree(out, ignore_errors=True)
        if file is not None:
            file[0].write_text(file[1])
        begin, cpu_begin, peak = time.perf_counter(), children_seconds(), 0
        with out.with_suffix(".log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(POLL_SECONDS)
            log.seek(0)
            if process.returncode:
                raise RuntimeError(f"{command[0]} exited with {process.returncode}: {log.read()[-1000:]}")
        for path in out.glob("*.safetensors"):
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        seconds, cpu = time.perf_counter() - begin, children_seconds() - cpu_begin
        return Sample(
            seconds,
            peak_bytes=float(peak),
            cpu_seconds=cpu,
            extra=compare(reference, out) if reference is not None else {},
        )

    return call


def compare(first: Path, second: Path) -> dict[str, Any]:
    """How many tensors of two folders hold the same bits, how many elements differ, and by how many steps."""
    tensors, others = _load(first), _load(second)
    if tensors.keys() != others.keys():
        return {"names that only one has": ", ".join(sorted(tensors.keys() ^ others.keys()))}
    unequal = {key: (tensors[key] != others[key]).sum().item() for key in tensors}
    steps = max(
        ((_ordered(tensors[key]) - _ordered(others[key])).abs().max().item() for key in tensors if unequal[key]),
        default=0,
    )
    numel = sum(tensor.numel() for tensor in tensors.values())
    return {
        "equal tensors": f"{sum(count == 0 for count in unequal.values())} of {len(tensors)}",
        "unequal elements": f"{sum(unequal.values())} of {numel}",
        "largest difference in bf16 steps": steps if math.isfinite(steps) else str(steps),
    }


def _load(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def _ordered(tensor: Tensor) -> Tensor:
    """bf16 values as integers in the same order, neighbours one apart."""
    bits = tensor.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
