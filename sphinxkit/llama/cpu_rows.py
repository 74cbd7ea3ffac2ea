"""A few rows times a matrix on a CPU: ``cpu_rows.c``, compiled where it runs.

torch hands a row times a matrix to libraries made for large products, which reach half of the memory's rate or less.
The kernel reads the matrix as fast as the memory gives it and does what ``RowFusion`` says besides. A C compiler that
knows OpenMP is needed (``CC``, else ``gcc``); it takes a second or two, once in each process, for the very processor.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from sphinxkit.llama.kernels import PLAIN, RowFusion

MAX_ROWS = 8  # of x; as in cpu_rows.c
DTYPES = (torch.bfloat16, torch.float32)
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_TIMEOUT_S = 120


class CpuRows:
    """The compiled kernel.

    Args:
        compiler: Command of a C compiler; None: what ``find_compiler`` finds.
        flags: For it.
    Raises:
        FileNotFoundError: There is no compiler.
        OSError: It failed, or what it made cannot be loaded.
    """

    def __init__(self, compiler: Sequence[str] | None = None, flags: Sequence[str] = FLAGS) -> None:
        command = compiler or find_compiler()
        if command is None:
            raise FileNotFoundError("there is no C compiler (CC, gcc)")
        source = resources.files("sphinxkit.llama").joinpath("cpu_rows.c").read_bytes()
        with tempfile.TemporaryDirectory(prefix="sphinxkit-") as folder:
            target = Path(folder) / "cpu_rows.so"
            parts = [*command, *flags, "-x", "c", "-", "-o", str(target), "-lm"]
            try:
                made = subprocess.run(parts, input=source, capture_output=True, timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise OSError(f"{command[0]} took longer than {_TIMEOUT_S} s") from error
            if made.returncode != 0:
                raise OSError(f"{command[0]} failed: {made.stderr.decode(errors='replace').strip()[:300]}")
            library = ctypes.CDLL(str(target))  # stays loaded without the file
        pointers, sizes, numbers = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 2, [ctypes.c_int] * 4
        self._call = library.linear_rows
        self._call.argtypes = [*pointers, *sizes, ctypes.c_float, *numbers]

    def linear_rows(self, x: Tensor, weight: Tensor, fusion: RowFusion = PLAIN) -> Tensor:
        """A few rows times a matrix, with what is fused into it. It records no gradient.

        Sums are float32. A norm, a gate and a sum round where torch's operators do, so the result is theirs but for the
        order of the sums.

        Args:
            x: At most ``MAX_ROWS`` rows, in bfloat16 or float32.
            weight: Contiguous, in the same dtype, like all of ``fusion``.
            fusion: What is done besides.
        Shape:
            x: (..., I)
            weight: (O, I)
            return: (..., O), or (..., O/2) if gated
        Raises:
            MemoryError: There is none for a copy of ``x``.
        """
        outputs, inputs = weight.shape
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs // 2 if fusion.gated else outputs)
        norm, residual = fusion.norm, fusion.residual
        failed = self._call(
            x.data_ptr(),
            weight.data_ptr(),
            None if norm is None else norm.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            outputs,
            inputs,
            fusion.eps,
            x.numel() // inputs,
            x.dtype == torch.bfloat16,
            fusion.gated,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {tuple(x.shape)} numbers")
        return out


def find_compiler() -> list[str] | None:
    """The command of a C compiler: environment variable ``CC``, else ``gcc``; None if neither is there."""
    command = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    return command if shutil.which(command[0]) else None
