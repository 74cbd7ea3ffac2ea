"""A training run as data: what a ``kind: train`` recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from sphinxkit.errors import RecipeError
from sphinxkit.registry import suggest
from sphinxkit.training.plan_keys import RENAMED_KEYS, part_errors

PARTS = ("llm", "projectors", "image_delimiters", "encoders")
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
        targets: Names of the linear layers that get one: the last part of their path.

    Source: LoRA, arXiv:2106.09685, section 4.1.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class TrainPlan:
    """A stage of training.

    Defaults that SPHINX's fine-tuning scripts publish: AdamW with betas 0.9 and 0.95, peak learning rate 2e-5 falling
    by a cosine to 0 after 3 % of warm-up, no weight decay, gradients clipped at 8, bfloat16, one epoch, frozen
    encoders. The other defaults are our choice, and so is every one of them where a plan is for pre-training.

    Args:
        model: A model recipe: shipped name, file, or the document itself.
        data: Streams of batches by name; the first one's epochs are counted.
        data_root: Folder that the mixtures' paths are relative to; "": the working folder.
        output: Folder of the run: log, checkpoints, exported model.
        init_from: Checkpoint, or several, to start from (what ``sphinxkit.load`` takes); later ones override, and each
            may hold a part only (a LLaMA). Or a source for each part: ``llm``, ``encoders``, ``projectors`` and
            ``image_delimiters`` take a checkpoint; an encoder by its type takes public weights as
            ``encoders.load_weights`` does (``"pretrained"``, a file or folder, ``hf://org/repo``); ``encoders:
            pretrained`` takes every encoder's own. What no source holds is random.
        allow_random_encoders: Let frozen encoders have random weights (for tests).
        tokenizer: SentencePiece model; None takes the recipe's or the first checkpoint's.
        steps: Number of steps; None: ``epochs`` of the first stream.
        epochs: Of the first stream.
        train: Parts that are trained, of llm, projectors, image_delimiters, encoders.
        lora: Train low-rank updates instead of the language model's own weights.
        dtype: Of the computation; weights, gradients and their sums over processes are float32.
        optimizer: ``adamw``, or ``muon`` for the matrices of the language model's layers and AdamW for all else.
        lr: Peak learning rate.
        min_lr: Where the cosine ends.
        warmup_ratio: Share of the steps in which the learning rate rises.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: On matrices; vectors have none.
        max_grad_norm: Largest norm of all gradients together; None: no limit.
        lr_scale: Factor on the learning rate of a part.
        max_tokens: Longest sample, image tokens included; None: the model's limit.
        packing: Pack samples into rows of ``pack_tokens`` without padding; else pad ``micro_batch_size`` rows.
        pack_tokens: Tokens of a packed row.
        micro_batch_size: Samples of a padded batch.
        device: auto, cpu or cuda.
        dp_replicate: Groups of processes that each hold all weights and share the data (HSDP); 1: one group.
        dp_shard: Processes of a group, which share its weights and the data (FSDP2); None: all that are left.
        tensor_parallel: Processes that share every matrix.
        activation_checkpointing: Compute the layers again in the backward pass instead of keeping their activations.
        compile: torch.compile of the feed-forward layers and norms. (Attention's pattern differs in every step.)
        encoder_cache: Folder for the frozen encoders' features; None: compute them every time.
        num_workers: Processes that read each stream; 0: read in the training process.
        seed: Of random weights and everything else that is drawn.
        save_every: Steps between checkpoints; None: at the end only.
        keep_checkpoints: How many of the newest are kept.
        async_save: Write while training goes on.
        stop_after: Save and stop at this step, with the schedule of all steps; for slices of a long run.
        log_every: Steps between lines of the log.
        tensorboard: Write TensorBoard files too.
        export: Write the model at the end, as ``sphinxkit.load`` reads it.
        peak_flops: FLOP/s of one device in ``dtype``, for the utilisation; None: known for some GPUs.
        on_nonfinite: At a loss or gradient that is not finite: ``stop`` the run, or ``skip`` the step and log it.
    Raises:
        RecipeError: Values that contradict each other; every one is listed.

    Source: SPHINX, arXiv:2311.07575, appendix; LLaMA2-Accessory, SPHINX's fine-tuning scripts.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = RENAMED_KEYS

    model: str | dict[str, Any]
    data: dict[str, StreamPlan]
    output: str
    data_root: str = ""
    init_from: str | list[str] | dict[str, str] | None = None
    allow_random_encoders: bool = False
    tokenizer: str | None = None
    steps: int | None = None
    epochs: float = 1.0
    train: list[str] = field(default_factory=lambda: ["llm", "projectors", "image_delimiters"])
    lora: LoraPlan | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-5
    min_lr: float = 0.0
    warmup_ratio: float = 0.03
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 8.0
    lr_scale: dict[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    packing: bool = True
    pack_tokens: int = 4096
    micro_batch_size: int = 4
    device: str = "auto"
    dp_replicate: int = 1
    dp_shard: int | None = None
    tensor_parallel: int = 1
    activation_checkpointing: bool = True
    compile: bool = False
    encoder_cache: str | None = None
    num_workers: int = 2
    seed: int = 0
    save_every: int | None = 500
    keep_checkpoints: int = 2
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
        errors = [*self._range_errors(), *self._choice_errors(), *self._part_errors()]
        if errors:
            raise RecipeError("\n".join(errors))

    def _range_errors(self) -> list[str]:
        positive: dict[str, float | None] = {name: getattr(self, name) for name in ("lr", "eps", "epochs")}
        counts = {name: getattr(self, name) for name in _COUNTS}
        for name, stream in self.data.items():
            counts[f"data.{name}.batch_size"] = stream.batch_size
            positive[f"data.{name}.weight"] = stream.weight
        if self.lora is not None:
            counts["lora.rank"] = self.lora.rank
            positive["lora.alpha"] = self.lora.alpha
        checks = [
            *((v is None or v > 0, f"{name}: must be positive, got {v}") for name, v in positive.items()),
            *((v is None or v >= 1, f"{name}: must be at least 1, got {v}") for name, v in counts.items()),
            (bool(self.data), "data: name at least one stream"),
            (0 <= self.warmup_ratio < 1, f"warmup_ratio: expected a share in [0, 1), got {self.warmup_ratio}"),
            (all(0 <= b < 1 for b in self.betas), f"betas: expected two numbers in [0, 1), got {list(self.betas)}"),
            (0 <= self.min_lr <= self.lr, f"min_lr: expected between 0 and lr, got {self.min_lr}"),
            (self.weight_decay >= 0, f"weight_decay: must not be negative, got {self.weight_decay}"),
            (self.num_workers >= 0, f"num_workers: must not be negative, got {self.num_workers}"),
            (
                self.max_grad_norm is None or self.max_grad_norm > 0,
                f"max_grad_norm: must be positive or null, got {self.max_grad_norm}",
            ),
        ]
        return [message for good, message in checks if not good]

    def _choice_errors(self) -> list[str]:
        return [
            f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}"
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
        ]

    def _part_errors(self) -> list[str]:
        errors = [*part_errors("train", self.train, PARTS), *part_errors("lr_scale", self.lr_scale, PARTS)]
        if not self.train and self.lora is None:
            errors.append("train: nothing would be trained")
        if self.lora is not None and "llm" in self.train:
            errors.append("lora, train: low-rank updates leave the language model frozen; take llm out of train")
        if self.lora is not None and self.tensor_parallel > 1:
            errors.append("lora, tensor_parallel: low-rank updates cannot be split among processes; use dp_shard")
        if self.optimizer == "muon" and "llm" not in self.train:
            errors.append(
                "optimizer: muon is for the matrices of the language model; put llm into train, or take adamw"
            )
        return errors

    def document(self) -> dict[str, Any]:
        """The plan as plain data, with ``kind``; what is saved beside the checkpoints."""
        return {"kind": "train", **asdict(self), "betas": list(self.betas)}


_COUNTS = (
    *("pack_tokens", "micro_batch_size", "tensor_parallel", "dp_replicate", "keep_checkpoints", "log_every"),
    *("steps", "max_tokens", "dp_shard", "save_every", "stop_after"),  # may be None
)
_CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "optimizer": ("adamw", "muon"),
    "on_nonfinite": ("stop", "skip"),
}


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
