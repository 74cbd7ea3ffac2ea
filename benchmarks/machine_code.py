"""Triton kernels compiled for a GPU that need not be here: registers, shared memory, and what their loops are made of.

Triton's compiler needs no GPU, and the tools that read its output come with it. A count is no measurement, but it tells
a kernel that cannot reach the memory's rate from one that can: an H100 or H200 begins at most 132 * 4 * 32
instructions a cycle, at about 1.8 GHz.
"""

from __future__ import annotations

import collections
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HEADS, HEAD_DIM, EMBED_DIM, HIDDEN_DIM, SLOTS = 40, 128, 5120, 13824, 2048  # LLaMA 13B
ROWS = (1, 32)


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was called.

    Args:
        name: Of the function.
        call: What it was called for.
        warps: Of a program.
        programs: Of the call.
        registers: Of a thread.
        stack_bytes: Of a thread: registers that did not fit.
        shared_bytes: Of a program.
        loop: Instructions of the longest loop, by their names; empty without a loop.
        loop_bytes: What a thread reads in one round of it by loads of 128 bits: codes, keys, values; of ``_linear_row``
            the weights, but the row and its norm, too.
    """

    name: str
    call: str
    warps: int
    programs: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    loop: collections.Counter[str]
    loop_bytes: int

    def __str__(self) -> str:
        text = (
            f"{self.name} ({self.call}): {self.programs} programs of {self.warps} warps, {self.registers} registers, "
            f"{self.stack_bytes} bytes spilled, {self.shared_bytes} bytes shared"
        )
        if not self.loop_bytes:
            return text
        total = self.loop.total()
        barriers = sum(count for name, count in self.loop.items() if name.startswith("BAR"))
        conversions = sum(count for name, count in self.loop.items() if name.startswith("I2F"))
        return (
            f"{text}; loop: {total} instructions for {self.loop_bytes} bytes in loads of 128 bits "
            f"({total / self.loop_bytes:.1f} a byte), {conversions} integers converted, {barriers} barriers"
        )


def compile_kernels(capability: int, dtype: torch.dtype) -> Iterator[Compiled]:
    """Every kernel of ``sphinxkit.llama`` at the sizes of LLaMA 13B. For a process of its own: no kernel runs after it.

    Args:
        capability: Of the GPU, 90 for 9.0.
        dtype: Of weights and tokens.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Absent:
        """Stands for the driver of a GPU."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = jit.JITFunction.run
    found: list[tuple[str, Any, tuple[int, ...]]] = []

    def launch(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        found.append((self.fn.__name__, run(self, *args, grid=grid, **kwargs | {"warmup": True}), grid))

    driver.set_active(Absent())
    jit.JITFunction.__getitem__ = lambda self, grid: lambda *args, **kwargs: launch(self, *args, grid=grid, **kwargs)
    for call, function in _calls(dtype):
        function()
        for name, kernel, grid in found:
            yield _read(name, call, kernel, grid, tools)
        found.clear()


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the models call, at LLaMA 13B's sizes; uninitialised memory, as nothing is computed."""
    from sphinxkit.llama import triton_attention, triton_kernels, triton_quantized, triton_rows
    from sphinxkit.llama.kernels import RowFusion

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    norm = empty(EMBED_DIM)
    for rows in ROWS:
        x, starts = empty(rows, 1, EMBED_DIM), torch.zeros(rows, dtype=torch.int64)
        for name, delta in (("", None), (", a sum before", x)):
            yield f"{rows} rows{name}", lambda x=x, d=delta: triton_kernels.add_rms_norm(x, d, norm, 1e-5)
        yield f"{rows} rows", lambda rows=rows: triton_kernels.silu_mul(empty(rows, 1, 2 * HIDDEN_DIM))
        freqs_cis = torch.empty(rows, 1, 1, HEAD_DIM // 2, dtype=torch.complex64)
        for groups in (HEADS, HEADS // 5):
            keys, values = (empty(rows, SLOTS, groups, HEAD_DIM).transpose(1, 2) for _ in range(2))
            qkv = empty(rows, 1, HEADS + 2 * groups, HEAD_DIM)
            cache = (starts, keys, values)
            name = f"{rows} rows, {HEADS // groups} query heads a key head"
            yield name, lambda qkv=qkv, r=freqs_cis, c=cache: triton_kernels.rotate_and_store(qkv, r, *c)
            q = empty(rows, HEADS, 1, HEAD_DIM)
            yield name, lambda q=q, c=cache: triton_attention.attend_token(q, c[1], c[2], c[0])
    x = empty(1, EMBED_DIM)
    for outputs, width, name, fusion in (
        (3 * EMBED_DIM, EMBED_DIM, "plain", RowFusion()),
        (3 * EMBED_DIM, EMBED_DIM, "norm", RowFusion(norm, 1e-5)),
        (EMBED_DIM, EMBED_DIM, "residual", RowFusion(residual=x)),
        (2 * HIDDEN_DIM, EMBED_DIM, "norm, gate", RowFusion(norm, 1e-5, gated=True)),
        (EMBED_DIM, HIDDEN_DIM, "residual", RowFusion(residual=x)),
    ):
        given, weight = empty(1, width), empty(outputs, width)
        label = f"{width} to {outputs}"
        yield f"{label}, {name}", lambda x=given, w=weight, f=fusion: triton_rows.linear_row(x, w, f)
        for bits in (8, 4):
            packed, several = _packed(outputs, width, bits, dtype), empty(ROWS[-1], width)
            call = f"{label}, {bits} bits"
            yield f"{call}, {name}", lambda x=given, p=packed, f=fusion: triton_quantized.quantized_row(x, *p, f)
            if name != "plain":
                yield f"{ROWS[-1]} rows, {call}", lambda x=several, p=packed: triton_quantized.quantized_linear(x, *p)
    for bits in (8, 4):
        packed = _packed(EMBED_DIM, EMBED_DIM, bits, dtype)
        yield f"{bits} bits", lambda p=packed: triton_quantized.expand(*p, dtype)


def _packed(outputs: int, width: int, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    scales = (outputs,) if bits == 8 else (outputs, width // 64, 2)
    codes = torch.empty(outputs, width * bits // 32, dtype=torch.int32)
    return codes, torch.empty(scales, dtype=dtype), bits, 64


def _read(name: str, call: str, kernel: Any, grid: tuple[int, ...], tools: Path) -> Compiled:
    def tool(program: str, *arguments: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [tools / program, *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", "--dump-resource-usage")))
    loop = max(_loops(tool("nvdisasm", "--print-code")), key=collections.Counter.total, default=collections.Counter())
    return Compiled(
        name,
        call,
        kernel.metadata.num_warps,
        math.prod(grid),
        int(usage["REG"]),
        int(usage["STACK"]),
        kernel.metadata.shared,
        loop,
        sum(16 * count for name, count in loop.items() if name.startswith("LDG") and ".128" in name),
    )


def _loops(code: str) -> Iterator[collections.Counter[str]]:
    """Instructions between each label and a later branch back to it."""
    places: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*\.(L_x_\d+):", line)
        if label:
            places[label[1]] = len(instructions)
        instruction = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if instruction:
            instructions.append(instruction[1])
            target = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
            if target and places.get(target[1], len(instructions)) < len(instructions) - 1:
                yield collections.Counter(instructions[places[target[1]] :])
