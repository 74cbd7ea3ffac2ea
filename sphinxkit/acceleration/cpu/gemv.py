"""A few rows times a matrix on a CPU (GEMV, for up to 32 vectors): ``gemv.c``, compiled where it runs.

torch hands a row times a matrix to libraries made for large products, which reach half of the memory's rate or less.
The kernel reads the matrix as fast as the memory gives it, and norms and gates besides. It is compiled for the very
processor, once in each process for each kind of matrix, in about a second, by gcc (``CC`` if that is set to one).
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

from sphinxkit.acceleration.ops import PLAIN, FusedOps
from sphinxkit.errors import ShapeError

MAX_ROWS = 32  # of x: more are torch's own business; measured on Zen 4, our choice
DTYPES = (torch.bfloat16, torch.float32)
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_TIMEOUT_S = 120


class Gemv:
    """The compiled kernel of a dtype.

    Args:
        dtype: Of all numbers, one of ``DTYPES``.
        compiler: Command of a C compiler; None: what ``find_compiler`` finds.
        flags: For it.
        coded: Whether matrices have codes of 8 bits, ``weight = code * scale`` with one scale for each row. ``x`` is
            then rounded to 16 bits of the largest of 2048 neighbours.
    Raises:
        OSError: There is no compiler, it failed, or what it made cannot be loaded.
        TypeError: There is no kernel for the dtype.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        compiler: Sequence[str] | None = None,
        flags: Sequence[str] = FLAGS,
        *,
        coded: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"a GEMV kernel was asked for {dtype}, expected one of {DTYPES}")
        self.dtype = dtype
        self.coded = coded
        command = compiler or find_compiler()
        if command is None:
            raise OSError("there is no C compiler (CC, gcc)")
        source = resources.files("sphinxkit.acceleration.cpu").joinpath("gemv.c").read_bytes()
        with tempfile.TemporaryDirectory(prefix="sphinxkit-") as folder:
            target = Path(folder) / "gemv.so"
            kind = [f"-DHALF={int(dtype == torch.bfloat16)}", f"-DCODES={int(coded)}"]
            parts = [*command, *flags, *kind, "-x", "c", "-", "-o", str(target), "-lm"]
            try:  # what CC says is the user's own
                made = subprocess.run(parts, input=source, capture_output=True, timeout=_TIMEOUT_S)  # noqa: S603
            except subprocess.TimeoutExpired as error:
                raise OSError(f"{command[0]} took longer than {_TIMEOUT_S} s") from error
            if made.returncode != 0:
                raise OSError(f"{command[0]} failed: {made.stderr.decode(errors='replace').strip()[:300]}")
            library = ctypes.CDLL(str(target))  # stays loaded without the file
        pointers, sizes, numbers = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 2, [ctypes.c_int] * 3
        self._call = library.gemv
        self._call.argtypes = [*pointers, *sizes, ctypes.c_float, *numbers]

    def __call__(self, x: Tensor, weight: Tensor, ops: FusedOps = PLAIN, scales: Tensor | None = None) -> Tensor:
        """A few rows times a matrix, with what is fused into it. It records no gradient.

        Sums are float32. A norm and a gate round where torch's operators do, so the result is theirs but for the order
        of the sums, and with codes for the rounding of ``x``, in which what is infinite is no number either.

        Args:
            x: At most ``MAX_ROWS`` rows, in the kernel's dtype.
            weight: Contiguous, in the same dtype, like the norm; codes in int8 if they are.
            ops: What is done besides.
            scales: Of the rows of codes, in the kernel's dtype.
        Shape:
            x: (..., I)
            weight: (O, I)
            scales: (O,)
            return: (..., O), or (..., O/2) if gated
        Raises:
            ShapeError: Sizes disagree, there are too many rows or none, or the matrix is not contiguous.
            TypeError: Something is of another dtype or not on the CPU.
            MemoryError: There is none for a copy of ``x``.
        """
        outputs, inputs = weight.shape
        rows, norm = x.numel() // inputs, ops.norm
        if not (0 < rows <= MAX_ROWS and x.shape[-1] == inputs and weight.is_contiguous()):
            raise ShapeError(
                f"gemv: expected 1 to {MAX_ROWS} rows of {inputs} and a contiguous matrix, got {tuple(x.shape)} "
                f"and strides {weight.stride()}"
            )
        if norm is not None and norm.shape != (inputs,):
            raise ShapeError(f"gemv: expected a norm of {inputs} numbers, got {tuple(norm.shape)}")
        if ops.gated and outputs % 2:
            raise ShapeError(f"gemv: gates and values need an even number of outputs, got {outputs}")
        given_scales = None if scales is None else tuple(scales.shape)
        if given_scales != ((outputs,) if self.coded else None):
            expected = f"{outputs} scales" if self.coded else "no scales"
            raise ShapeError(f"gemv: expected {expected}, got {given_scales}")
        of_matrix = torch.int8 if self.coded else self.dtype
        for tensor, dtype in ((x, self.dtype), (weight, of_matrix), (norm, self.dtype), (scales, self.dtype)):
            if tensor is not None and (tensor.dtype != dtype or not tensor.is_cpu):
                raise TypeError(f"gemv: expected {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
        x, norm = x.contiguous(), None if norm is None else norm.contiguous()
        scales = None if scales is None else scales.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs // 2 if ops.gated else outputs)
        failed = self._call(
            x.data_ptr(),
            weight.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if norm is None else norm.data_ptr(),
            out.data_ptr(),
            outputs,
            inputs,
            ops.eps,
            rows,
            ops.gated,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {tuple(x.shape)} numbers")
        return out


def find_compiler() -> list[str] | None:
    """The command of a C compiler: environment variable ``CC`` if there is such a program, else ``gcc``, else None."""
    for command in (shlex.split(os.environ.get("CC", "")), ["gcc"]):
        if command and shutil.which(command[0]):
            return command
    return None
