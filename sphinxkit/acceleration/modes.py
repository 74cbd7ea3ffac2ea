"""How a language model generates text, by name."""

from __future__ import annotations

from typing import Literal

from sphinxkit.acceleration.accelerator import FusedAccelerator
from sphinxkit.acceleration.compiled import CompiledAccelerator
from sphinxkit.errors import DataError
from sphinxkit.llama.model import LlamaModel

Mode = Literal["auto", "compile"]


def accelerate(llm: object, mode: Mode | None = "auto") -> None:
    """Set a language model's ``accelerator``; nothing is prepared before the first prompt is read.

    Args:
        llm: A ``LlamaModel``. Another library's model is left as it is.
        mode: "auto": ``FusedAccelerator``. "compile": ``CompiledAccelerator``. None: the plain modules.
    Raises:
        DataError: The mode is unknown, or "compile" is asked for another library's model.
        RegistryError: The model cannot be compiled here.
    """
    if mode not in ("auto", "compile", None):
        raise DataError(f"accelerate: expected 'auto', 'compile' or None, got {mode!r}")
    if not isinstance(llm, LlamaModel):
        if mode == "compile":
            raise DataError(f"accelerate: expected sphinxkit's LLaMA to compile, got {type(llm).__name__}")
    elif mode == "compile":
        compiled = CompiledAccelerator()
        compiled.check(llm)
        llm.accelerator = compiled
    else:
        llm.accelerator = None if mode is None else FusedAccelerator()
