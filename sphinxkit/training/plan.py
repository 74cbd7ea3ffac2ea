"""A training run as data: what a ``kind: train`` recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from sphinxkit.errors import RecipeError
from sphinxkit.registry import suggest

PARTS = ("llm", "projectors", "tags", "encoders")
"""What can be trained: the language model, the projectors, the image's start and end token, the encoders."""

_FORBID: Mapping[str, str] = {"extra": "forbid"}


@dataclass
class StreamPlan:
    """One stream of batches: every step takes one batch of each stream.

    Args:
        mixture: A mixture recipe: shipped name, file, or the document itself; its ``batch_size`` is this stream's.
            Or ``{type: "package.module:builder", option: value, ...}`` for a mixture that is not made of files.
        batch_size: Samples of it in a step, over all processes.
        weight: Of its mean loss; the step's loss is the weighted mean over the streams.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    mixture: str | dict[str, Any]
    batch_size: int
    weight: float = 1.0


@dataclass
class LoraPlan:
    """Low-rank updates of the language model's matrices, which stay frozen themselves.

    Args:
        rank: Of an update.
        alpha: An update is scaled by ``alpha / rank``.
        targets: Last names of the linear layers that get one.

    Source: LoRA, arXiv:2106.09685, section 4.1.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


# What may differ between save and resume: it changes where and how fast a run computes, not what.
FREE_KEYS = frozenset(
    {
        "output",
        "data_root",
        "device",
        "fsdp",
        "tensor_parallel",
        "activation_checkpointing",
        "compile",
        "encoder_cache",
        "workers",
        "pack_tokens",
        "packing",
        "micro_batch_size",
        "save_every",
        "keep",
        "async_save",
        "stop_after",
        "log_every",
        "tensorboard",
        "export",
        "peak_flops",
        "on_nonfinite",
    }
)


@dataclass
class TrainPlan:
    """A stage of training.

    Published by SPHINX's authors: AdamW with betas 0.9 and 0.95, peak learning rate 2e-5 falling by a cosine to 0 after
    3 % of warm-up, no weight decay, gradients clipped at 8, batches of 128, bfloat16, one epoch, frozen encoders. The
    other defaults are our choice.

    Args:
        model: A model recipe: shipped name, file, or the document itself.
        data: Streams of batches by name; the first one's epochs are counted.
        data_root: Folder that the mixtures' paths are relative to; "": the working folder.
        output: Folder of the run: log, checkpoints, exported model.
        init: Checkpoint, or several, to start from (what ``sphinxkit.load`` takes); later ones override, and each may
            hold a part only (a LLaMA). What none holds is random.
        allow_random_encoders: Let frozen encoders have random weights (for tests).
        tokenizer: SentencePiece model; None takes the recipe's or the first checkpoint's.
        steps: How many; None: ``epochs`` of the first stream.
        epochs: Of the first stream.
        train: Parts that are trained, of llm, projectors, tags, encoders.
        lora: Train low-rank updates instead of the language model's own weights.
        dtype: Of the arithmetic; weights, gradients and their sums over processes are float32.
        optimizer: ``adamw``, or ``muon`` for the matrices of the language model's layers and AdamW for all else.
        lr: Peak learning rate.
        min_lr: Where the cosine ends.
        warmup: Share of the steps in which the learning rate rises.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: On matrices; vectors have none.
        clip: Largest norm of all gradients together; None: no limit.
        lr_scale: Factor on the learning rate of a part.
        max_tokens: Longest sample, image slots included; None: the model's limit.
        packing: Pack samples into rows of ``pack_tokens`` without padding; else pad ``micro_batch_size`` rows.
        pack_tokens: Tokens of a packed row.
        micro_batch_size: Samples of a padded batch.
        device: auto, cpu or cuda.
        fsdp: Processes that share the weights and the data; None: all that tensor parallelism leaves.
        tensor_parallel: Processes that share every matrix.
        activation_checkpointing: Compute the layers again in the backward pass instead of keeping what is inside.
        compile: torch.compile of the feed-forward layers and norms. (Attention's pattern is another in every step.)
        encoder_cache: Folder for the frozen encoders' features; None: compute them every time.
        workers: Processes that read each stream; 0: read in the training process.
        seed: Of random weights and everything else that is drawn.
        save_every: Steps between checkpoints; None: at the end only.
        keep: Newest checkpoints that are kept.
        async_save: Write while training goes on.
        stop_after: Save and stop at this step, with the schedule of all steps; for slices of a long run.
        log_every: Steps between lines of the log.
        tensorboard: Write TensorBoard files too.
        export: Write the model at the end, as ``sphinxkit.load`` reads it.
        peak_flops: FLOP/s of one device in ``dtype``, for the utilisation; None: known for some GPUs.
        on_nonfinite: At a loss or gradient that is not finite: ``stop`` the run, or ``skip`` the step and say so.
    Raises:
        RecipeError: Values that contradict each other; every one is listed.

    Source: SPHINX, arXiv:2311.07575, section 4.1 and appendix; LLaMA2-Accessory, SPHINX's fine-tuning scripts.
    """

    model: str | dict[str, Any]
    data: dict[str, StreamPlan]
    output: str
    data_root: str = ""
    init: str | list[str] | None = None
    allow_random_encoders: bool = False
    tokenizer: str | None = None
    steps: int | None = None
    epochs: float = 1.0
    train: list[str] = field(default_factory=lambda: ["llm", "projectors", "tags"])
    lora: LoraPlan | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-5
    min_lr: float = 0.0
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 8.0
    lr_scale: dict[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    packing: bool = True
    pack_tokens: int = 4096
    micro_batch_size: int = 4
    device: str = "auto"
    fsdp: int | None = None
    tensor_parallel: int = 1
    activation_checkpointing: bool = True
    compile: bool = False
    encoder_cache: str | None = None
    workers: int = 2
    seed: int = 0
    save_every: int | None = 500
    keep: int = 2
    async_save: bool = True
    stop_after: int | None = None
    log_every: int = 1
    tensorboard: bool = False
    export: bool = True
    peak_flops: float | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        self.data = {name: _nested(StreamPlan, f"data.{name}", value) for name, value in self.data.items()}
        self.lora = None if self.lora is None else _nested(LoraPlan, "lora", self.lora)
        self.betas = (self.betas[0], self.betas[1])
        faults = self._faults()
        if faults:
            raise RecipeError("\n".join(faults))

    def _faults(self) -> list[str]:
        rates = {"lr": self.lr, "eps": self.eps, "epochs": self.epochs}
        counts = {
            "pack_tokens": self.pack_tokens,
            "micro_batch_size": self.micro_batch_size,
            "tensor_parallel": self.tensor_parallel,
            "keep": self.keep,
            "log_every": self.log_every,
        }
        optional = {
            name: value
            for name in ("steps", "max_tokens", "fsdp", "save_every", "stop_after")
            if (value := getattr(self, name)) is not None
        }
        faults = [f"{name}: must be positive, got {value}" for name, value in rates.items() if not value > 0]
        faults += [
            f"{name}: must be at least 1, got {value}" for name, value in (counts | optional).items() if value < 1
        ]
        if not self.data:
            faults.append("data: name at least one stream")
        for name, stream in self.data.items():
            if stream.batch_size < 1:
                faults.append(f"data.{name}.batch_size: must be at least 1, got {stream.batch_size}")
            if not stream.weight > 0:
                faults.append(f"data.{name}.weight: must be positive, got {stream.weight}")
        for key, parts in (("train", self.train), ("lr_scale", self.lr_scale)):
            faults += [
                f"{key}: expected parts of {', '.join(PARTS)}, got {part!r}{suggest(part, PARTS)}"
                for part in parts
                if part not in PARTS
            ]
        if not self.train and self.lora is None:
            faults.append("train: nothing would be trained")
        if self.lora is not None and "llm" in self.train:
            faults.append("lora, train: low-rank updates leave the language model frozen; take llm out of train")
        if self.lora is not None and self.tensor_parallel > 1:
            faults.append("lora, tensor_parallel: low-rank updates cannot be shared among processes; use fsdp")
        if not 0 <= self.warmup < 1:
            faults.append(f"warmup: expected a share of the steps in [0, 1), got {self.warmup}")
        if not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"betas: expected two numbers in [0, 1), got {list(self.betas)}")
        if not 0 <= self.min_lr <= self.lr:
            faults.append(f"min_lr: expected between 0 and lr, got {self.min_lr}")
        if self.weight_decay < 0 or self.workers < 0:
            faults.append(f"weight_decay, workers: must not be negative, got {self.weight_decay}, {self.workers}")
        if self.clip is not None and not self.clip > 0:
            faults.append(f"clip: must be positive or null, got {self.clip}")
        if self.dtype not in ("bfloat16", "float32"):
            faults.append(f"dtype: expected bfloat16 or float32, got {self.dtype!r}")
        if self.optimizer not in ("adamw", "muon"):
            faults.append(f"optimizer: expected adamw or muon, got {self.optimizer!r}")
        if self.optimizer == "muon" and "llm" not in self.train:
            faults.append(
                "optimizer: muon is for the matrices of the language model; put llm into train, or take adamw"
            )
        if self.on_nonfinite not in ("stop", "skip"):
            faults.append(f"on_nonfinite: expected stop or skip, got {self.on_nonfinite!r}")
        return faults

    @property
    def checkpoints(self) -> list[str]:
        """``init`` as a list."""
        return [self.init] if isinstance(self.init, str) else list(self.init or [])

    def document(self) -> dict[str, Any]:
        """The plan as plain data, with ``kind``; what is saved beside the checkpoints."""
        return {"kind": "train", **asdict(self), "betas": list(self.betas)}


def _nested(kind: type[Any], where: str, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    known = [entry.name for entry in fields(kind)]
    unknown = [key for key in value if key not in known] if isinstance(value, Mapping) else []
    if unknown:
        raise RecipeError(f"{where}.{unknown[0]}: unknown key{suggest(str(unknown[0]), known)}")
    try:
        return kind(**value)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between the plan of a saved run and the one that is to resume it, as ``key: old -> new``.

    Keys that change where and how fast a run computes but not what (``FREE_KEYS``) do not count.

    Args:
        saved: The document beside the checkpoint.
        current: The document now.
        prefix: Of the keys, for nested mappings.
    """
    lines = []
    for key in sorted(set(saved) | set(current), key=str):
        if not prefix and key in FREE_KEYS:
            continue
        old, new = saved.get(key, "(absent)"), current.get(key, "(absent)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines
