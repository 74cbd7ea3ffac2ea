"""Every Triton kernel becomes machine code for GPUs that are not here: Triton's compiler needs none.

The interpreter of ``test_triton_kernels`` takes what the compiler does not, and a kernel that spills registers to
memory would be as slow as it is right.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HEADS, HEAD_DIM, EMBED_DIM, HIDDEN_DIM, SLOTS = 40, 128, 5120, 13824, 2048  # LLaMA 13B
SHARED_BYTES = 99 * 1024  # that a program can have on every GPU from capability 8.0 on


def compile_all(capability: int, dtype: torch.dtype) -> list[str]:
    """Call every kernel as the models do, with a compiler in the place of the launch; names of what was compiled."""
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

    compiled: list[str] = []
    run = jit.JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, **kwargs | {"warmup": True})
        name = f"{self.fn.__name__} for {capability}, {dtype}"
        usage = resource_usage(Path(triton.__file__).parent, kernel.asm["cubin"])
        assert " STACK:0 " in usage, f"{name} spills registers: {usage}"
        assert kernel.metadata.shared <= SHARED_BYTES, f"{name} needs {kernel.metadata.shared} bytes of shared memory"
        compiled.append(self.fn.__name__)

    driver.set_active(Absent())
    jit.JITFunction.__getitem__ = lambda self, grid: lambda *args, **kwargs: launch(self, *args, grid=grid, **kwargs)
    call_all(dtype)
    return compiled


def resource_usage(triton: Path, binary: bytes) -> str:
    """What ``cuobjdump`` says of a kernel's registers and memory."""
    path = Path("kernel.cubin")
    path.write_bytes(binary)
    tool = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return done.stdout


def call_all(dtype: torch.dtype) -> None:
    from sphinxkit.llama import triton_attention, triton_kernels, triton_quantized, triton_rows
    from sphinxkit.llama.kernels import RowFusion

    norm = torch.empty(EMBED_DIM, dtype=dtype)
    for rows in (1, 32):
        x = torch.empty(rows, 1, EMBED_DIM, dtype=dtype)
        for delta in (None, x):
            triton_kernels.add_rms_norm(x, delta, norm, 1e-5)
        triton_kernels.silu_mul(torch.empty(rows, 1, 2 * HIDDEN_DIM, dtype=dtype))
        starts = torch.zeros(rows, dtype=torch.int64)
        rotations = torch.empty(rows, 1, 1, HEAD_DIM // 2, dtype=torch.complex64)
        for groups in (HEADS, HEADS // 5):
            shape = (rows, SLOTS, groups, HEAD_DIM)
            keys, values = (torch.empty(shape, dtype=dtype).transpose(1, 2) for _ in range(2))
            qkv = torch.empty(rows, 1, HEADS + 2 * groups, HEAD_DIM, dtype=dtype)
            queries = triton_kernels.rotate_and_store(qkv, rotations, starts, keys, values)
            triton_attention.attend_token(queries.transpose(1, 2), keys, values, starts)
        for outputs in (EMBED_DIM, 3 * EMBED_DIM):
            for bits in (8, 4):
                codes = torch.empty(outputs, EMBED_DIM * bits // 32, dtype=torch.int32)
                scales = torch.empty((outputs,) if bits == 8 else (outputs, EMBED_DIM // 64, 2), dtype=dtype)
                if rows > 1:
                    triton_quantized.quantized_linear(x[:, 0], codes, scales, bits, 64)
                    continue
                weight = torch.empty(outputs, EMBED_DIM, dtype=dtype)
                triton_quantized.expand(codes, scales, bits, 64, dtype)
                own = RowFusion(residual=x), RowFusion(norm, 1e-5), RowFusion(norm, 1e-5, gated=True)
                for fusion in own[1:] if outputs > EMBED_DIM else own[:1]:
                    triton_rows.linear_row(x, weight, fusion)
                    triton_quantized.quantized_row(x, codes, scales, bits, 64, fusion)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, "bfloat16"),
        pytest.param(90, "float16", marks=pytest.mark.slow),
        pytest.param(80, "bfloat16", marks=pytest.mark.slow),
        pytest.param(100, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_without_spilling(tmp_path: Path, capability: int, dtype: str) -> None:
    pytest.importorskip("triton")
    code = (
        f"import sys, torch\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_triton_compiled import compile_all\n"
        f"print(*sorted(set(compile_all({capability}, torch.{dtype}))))"
    )
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "_add_rms_norm",
        "_attend_share",
        "_expand",
        "_join_shares",
        "_linear_row",
        "_quantized_row",
        "_quantized_rows",
        "_rotate_and_store",
        "_silu_mul",
    ]
