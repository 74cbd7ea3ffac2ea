"""Options shared by several commands."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from sphinxkit.cli.completion import complete_checkpoint, complete_names, complete_recipe
from sphinxkit.errors import DataError
from sphinxkit.hub import NANO, TITLE

if TYPE_CHECKING:
    import torch

    from sphinxkit.sphinx_model import SphinxModel

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Checkpoint directory of any format, hf://org/repo, or nano, which comes with sphinxkit.",
        autocompletion=complete_checkpoint,
    ),
]
"""A command that may go without one takes ``checkpoints.NANO`` as the default."""
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Recipe (name or file) to use instead of the checkpoint's.", autocompletion=complete_recipe
    ),
]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda or cuda:N.", autocompletion=complete_names(more=("auto", "cpu", "cuda"))),
]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 where the hardware has it), float32, bfloat16 or float16.")]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        help="PREFIX=PREFIX of the other models' tensors, such as model.=language_model.model.; or llm_into_vlm.",
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

Trust = Annotated[
    bool, typer.Option("--trust", help="Import and call the code that the recipe names (package.module:builder).")
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not verify the checksums in the checkpoint's files.")]
Replicas = Annotated[
    str, typer.Option(help="If shards differ in a replicated tensor: equal: refuse; first: use the first shard.")
]
LlamaType = Annotated[
    str | None,
    typer.Option("--llama-type", help="Type of a released directory (llama_ens5); counts before its meta.json."),
]
Overlay = Annotated[
    list[str] | None,
    typer.Option(
        "--overlay",
        help="Tuned directory whose tensors take the model's place (repeatable; the last counts).",
        autocompletion=complete_checkpoint,
    ),
]
TokenizerFile = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Tokenizer file or directory, where the checkpoint's own does not count."),
]
Bits = Annotated[
    int | None,
    typer.Option(help="Quantise the language model's linear layers to 8 or 4 bits. Default: off."),
]
Accelerate = Annotated[
    str,
    typer.Option(
        help="auto: joint projections and, on a CPU, a compiled kernel; compile: torch.compile on top, which takes "
        "minutes at first; none: the plain model."
    ),
]

ACCELERATE = ("auto", "compile", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# CPU flags that mean bfloat16 arithmetic in hardware, as Linux names them in /proc/cpuinfo.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not BF16_FLAGS.isdisjoint(flags)


def pick_device(name: str) -> torch.device:
    """Resolve the device; ``auto`` is CUDA if available. With torchrun, CUDA is the process's own GPU.

    Raises:
        DataError: There is no such device.
    """
    import torch

    own = os.environ.get("LOCAL_RANK")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda" if own is None else f"cuda:{own}")
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {name}: this machine has no CUDA device that torch {torch.__version__} can use")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        DataError: Not one of float32, bfloat16, float16.
    """
    import torch

    if name not in DTYPES[1:]:
        raise DataError(f"--dtype {name!r}: expected one of {', '.join(DTYPES[1:])}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve the dtype; ``auto`` is bfloat16 if the hardware supports it, and reports the choice on stderr."""
    import torch

    if name not in DTYPES:
        raise DataError(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}")
    if name != "auto":
        return parse_dtype(name)
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type == "cpu" and cpu_has_bf16()
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    reason = "has" if has_bf16 else "lacks"
    typer.echo(
        f"dtype: {str(dtype).removeprefix('torch.')} (this {device.type} {reason} bfloat16 arithmetic)", err=True
    )
    return dtype


def parse_replicas(name: str) -> Literal["equal", "first"]:
    """Parse the policy for shards that differ.

    Raises:
        DataError: Neither equal nor first.
    """
    if name not in ("equal", "first"):
        raise DataError(f"--replicas {name!r}: expected equal or first")
    return "first" if name == "first" else "equal"


def parse_part(name: str | None) -> Literal["llm", "encoders"] | None:
    """A part of a checkpoint, by name; None is all of it.

    Raises:
        DataError: Neither llm nor encoders.
    """
    if name not in (None, "llm", "encoders"):
        raise DataError(f"--part {name!r}: expected llm or encoders")
    return "llm" if name == "llm" else "encoders" if name else None


def load_model(
    checkpoint: str,
    recipe: str | None,
    device: str,
    dtype: str,
    no_verify: bool = False,
    replicas: str = "equal",
    llama_type: str | None = None,
    bits: int | None = None,
    accelerate: str = "auto",
    overlay: Sequence[str] | None = None,
    tokenizer: str | None = None,
) -> SphinxModel:
    """Load a checkpoint as the options say.

    Raises:
        DataError: An option is not possible, or options contradict each other.
    """
    from sphinxkit.recipe import load

    place = pick_device(device)
    _check_speed(bits, accelerate, place)
    model = load(
        checkpoint,
        recipe=recipe,
        device=place,
        dtype=pick_dtype(dtype, place),
        verify=not no_verify,
        replicas=parse_replicas(replicas),
        llama_type=llama_type,
        overlay=overlay,
        tokenizer=tokenizer,
        accelerate=None if accelerate == "none" else "compile" if accelerate == "compile" else "auto",
    )
    if checkpoint == NANO:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        typer.echo(f"model: {TITLE}, {millions:.1f} M parameters", err=True)
    if bits is not None:
        quantize_model(model, bits)
    return model


def _check_speed(bits: int | None, accelerate: str, device: torch.device) -> None:
    if bits not in (None, 4, 8):
        raise DataError(f"--bits {bits}: expected 8 or 4")
    if accelerate not in ACCELERATE:
        raise DataError(f"--accelerate {accelerate!r}: expected one of {', '.join(ACCELERATE)}")
    if accelerate == "compile" and bits is not None and device.type == "cpu":
        raise DataError(
            "--accelerate compile, --bits: on a CPU quantised weights are not compiled; expected one of the two"
        )


def quantize_model(model: SphinxModel, bits: int) -> None:
    """Quantise the language model in place.

    Raises:
        DataError: The language model is another library's.
    """
    from sphinxkit.acceleration import quantize
    from sphinxkit.llama import LlamaModel

    llm: object = model.llm
    if not isinstance(llm, LlamaModel):
        raise DataError(f"--bits: expected sphinxkit's LLaMA, got {type(llm).__name__}")
    quantize(llm, bits)


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded."""

    recipe: RecipeOption = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    no_verify: NoVerify = False
    replicas: Replicas = "equal"
    llama_type: LlamaType = None
    bits: Bits = None
    accelerate: Accelerate = "auto"
    overlay: Overlay = None
    tokenizer: TokenizerFile = None

    def load(self, checkpoint: str) -> SphinxModel:
        """See ``load_model``."""
        return load_model(
            checkpoint,
            self.recipe,
            self.device,
            self.dtype,
            self.no_verify,
            self.replicas,
            self.llama_type,
            self.bits,
            self.accelerate,
            self.overlay,
            self.tokenizer,
        )


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is written."""

    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.")] = 512
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: probability mass to keep.")] = 1.0
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.")] = None
    num_draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens drafted by prompt lookup (greedy only).")
    ] = None


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Put the fields of every parameter that is a dataclass in its place, each an option of its own.

    ``def chat(image: ..., loading: LoadOptions)`` becomes a command with ``--image``, ``--recipe``, ``--device``, ...
    """
    groups: dict[str, type[Any]] = {}
    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        groups[name] = hints[name]
        inner = get_type_hints(hints[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=inner[option.name]
            )
            for option in fields(hints[name])
        ]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{option.name: values.pop(option.name) for option in fields(group)})
        command(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded
