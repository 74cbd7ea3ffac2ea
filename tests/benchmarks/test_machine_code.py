"""Every Triton kernel becomes machine code for GPUs that are not here: Triton's compiler needs none.

Triton's interpreter, in which ``tests/llama/test_triton_kernels.py`` computes, takes what the compiler does not, and a
kernel that spills registers to memory would be as slow as it is right.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine_code import _loops

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = 99 * 1024  # that a program can have on every GPU from capability 8.0 on
KERNELS = [
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


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("90", "bfloat16"),
        pytest.param("90", "float16", marks=pytest.mark.slow),
        pytest.param("80", "bfloat16", marks=pytest.mark.slow),
        pytest.param("100", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_without_spilling(tmp_path: Path, capability: str, dtype: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks", "kernels", "--capability", capability, "--dtype", dtype]
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted({line.split()[0] for line in lines}) == KERNELS
    for line in lines:
        assert ", 0 bytes spilled, " in line, line
        shared = re.search(r"(\d+) bytes shared", line)
        assert shared is not None
        assert int(shared[1]) <= SHARED_BYTES, line
        if line.startswith(("_linear_row", "_quantized_row ")):
            # what they were written for: a thread's columns are its own, and no integer is converted
            assert "0 integers converted, 0 barriers" in line, line


def test_loops_are_read_from_the_code() -> None:
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/              @!P0 LDG.E.U16 R8, [R2] ;
        /*0030*/                   FFMA R1, R4, R8, R1 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1);
"""
    (loop,) = _loops(code)
    assert dict(loop) == {"LDG.E.128": 1, "LDG.E.U16": 1, "FFMA": 1, "BRA": 1}
