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
    """One data stream; every step takes one batch from each stream.

    Args:
        mixture: A mixture recipe: shipped name, file, or the document itself; its ``batch_size`` is this stream's.
            Or ``{type: "package.module:builder", option: value, ...}`` for a mixture without files.
        batch_size: Samples per step, over all processes.
        weight: Weight of its mean loss; the step's loss is the weighted mean over the streams.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    mixture: str | dict[str, Any]
    batch_size: int
    weight: float = 1.0


@dataclass
class LoraPlan:
    """LoRA: low-rank updates of the language model's frozen matrices.

    Args:
        rank: Rank of an update.
        alpha: An update is scaled by ``alpha / rank``.
        targets: Names of the linear layers to update (last part of the module path).
        init_from: Folder of a PEFT adapter of this rank, alpha and targets to go on from; None draws new factors.

    Source: LoRA, arXiv:2106.09685, section 4.1.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    init_from: str | None = None


@dataclass
class BenchmarkPlan:
    """A benchmark that a run is evaluated on, as by ``sphinxkit.evaluate``.

    Args:
        benchmark: Name of a benchmark or a task.
        annotations: Its annotation file.
        images: Base folder of image paths.
        batch_size: Questions decoded together.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    benchmark: str
    annotations: str
    images: str
    batch_size: int = 8


@dataclass
class EvaluationPlan:
    """What a run is evaluated on every ``evaluate_every`` steps, and at its end.

    Args:
        data: Streams whose mean loss per token is computed, on the same samples each time.
        num_batches: Batches of each stream.
        benchmarks: Benchmarks by name. The first process answers them with an exported copy of the model.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _FORBID

    data: dict[str, StreamPlan] = field(default_factory=dict)
    num_batches: int = 8
    benchmarks: dict[str, BenchmarkPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = {name: _nested(StreamPlan, f"evaluate.data.{name}", each) for name, each in self.data.items()}
        self.benchmarks = {
            name: _nested(BenchmarkPlan, f"evaluate.benchmarks.{name}", each) for name, each in self.benchmarks.items()
        }
        sizes = [self.num_batches, *(each.batch_size for each in self.data.values())]
        if min([*sizes, *(each.batch_size for each in self.benchmarks.values())]) < 1:
            raise RecipeError("evaluate: num_batches and batch_size must be at least 1")


@dataclass
class TrainPlan:
    """A stage of training.

    Defaults published in SPHINX's fine-tuning scripts: AdamW with betas 0.9 and 0.95, peak learning rate 2e-5 with
    cosine decay to 0 after 3 % warm-up, no weight decay, gradients clipped at 8, bfloat16, one epoch, frozen encoders.
    All other defaults are our choice. For pre-training, every default is our choice.

    Args:
        model: A model recipe: shipped name, file, the document itself, or a checkpoint that has one (``nano``, a path).
        data: Data streams by name; ``epochs`` counts the first one.
        data_root: Base folder of the mixtures' paths; "": the working folder.
        output: Run folder: log, checkpoints, exported model.
        init_from: One or more checkpoints to start from (anything ``sphinxkit.load`` takes). Later ones override
            earlier ones, and each may hold only a part (a LLaMA). Or one source per part: ``llm``, ``encoders``,
            ``projectors`` and ``image_delimiters`` take a checkpoint; an encoder by its type takes public weights as
            ``encoders.load_weights`` does (``"pretrained"``, a file or folder, ``hf://org/repo``); ``encoders:
            pretrained`` loads every encoder's own public weights. Tensors without a source are random.
        allow_random_encoders: Allow random weights in frozen encoders (for tests).
        tokenizer: SentencePiece model; None: the recipe's or the first checkpoint's.
        steps: Number of steps; None: ``epochs`` of the first stream.
        epochs: Epochs of the first stream.
        train: Trained parts, from llm, projectors, image_delimiters, encoders.
        lora: Train LoRA updates instead of the language model's own weights.
        dtype: Compute dtype. Weights, gradients and gradient reductions are float32.
        optimizer: ``adamw``, or ``muon`` (Muon for the matrices of the language model's layers, AdamW for the rest).
        lr: Peak learning rate.
        min_lr: Final learning rate of the cosine.
        warmup_ratio: Fraction of warm-up steps.
        betas: Betas of AdamW.
        eps: Epsilon of AdamW.
        weight_decay: Weight decay of matrices; vectors have none.
        max_grad_norm: Gradient clipping: maximum global norm; None: no limit.
        lr_scale: Factor on the learning rate, by part.
        max_tokens: Maximum length of a sample, image tokens included; None: the model's limit.
        packing: Pack samples into rows of ``pack_tokens`` without padding. False: pad batches of ``micro_batch_size``.
        pack_tokens: Tokens of a packed row.
        micro_batch_size: Samples of a padded batch.
        device: auto, cpu or cuda.
        dp_replicate: Number of replica groups (HSDP); each group holds all weights. 1: one group.
        dp_shard: Processes per group over which weights are sharded (FSDP2); None: all remaining processes.
        tensor_parallel: Tensor-parallel size: processes that share every matrix.
        activation_checkpointing: Recompute the layers in the backward pass instead of storing activations.
        compile: torch.compile of the feed-forward layers and norms. (Attention's pattern differs in every step.)
        encoder_cache: Folder for the frozen encoders' features; None: compute them every time.
        num_workers: Reader processes per stream; 0: read in the training process.
        seed: Random seed of weights, data order and everything else random.
        save_every: Steps between checkpoints; None: at the end only.
        keep_checkpoints: Number of newest checkpoints to keep.
        async_save: Write checkpoints in the background during training.
        stop_after: Save and stop at this step; the schedule still covers all steps. For running a long run in slices.
        log_every: Steps between log lines.
        evaluate_every: Steps between evaluations; None: none.
        evaluate: What to evaluate.
        tensorboard: Also write TensorBoard files.
        wandb: Project of Weights & Biases to log to; None: not. ``WANDB_MODE=offline`` keeps everything on disk.
        profile: ``[first, last]``: write torch's profile of these steps of the first process to ``profile.json``.
        export: Write the final model for ``sphinxkit.load``.
        peak_flops: FLOP/s of one device in ``dtype``, for the utilisation; None: known for some GPUs.
        on_nonfinite: On a non-finite loss or gradient: ``stop`` the run, or ``skip`` the step and log it.
    Raises:
        RecipeError: Values contradict each other; the message lists every contradiction.

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
    evaluate_every: int | None = None
    evaluate: EvaluationPlan | None = None
    tensorboard: bool = False
    wandb: str | None = None
    profile: tuple[int, int] | None = None
    export: bool = True
    peak_flops: float | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        self.data = {name: _nested(StreamPlan, f"data.{name}", value) for name, value in self.data.items()}
        self.evaluate = None if self.evaluate is None else _nested(EvaluationPlan, "evaluate", self.evaluate)
        self.profile = None if self.profile is None else (self.profile[0], self.profile[1])
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
            (
                (self.evaluate is None) == (self.evaluate_every is None),
                "evaluate, evaluate_every: one says what, the other how often; give both or neither",
            ),
            (
                self.profile is None or 1 <= self.profile[0] <= self.profile[1],
                f"profile: expected [first, last] steps, counted from 1, got {list(self.profile or ())}",
            ),
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
        """The plan as plain data, with ``kind``; saved beside the checkpoints."""
        profile = None if self.profile is None else list(self.profile)
        return {"kind": "train", **asdict(self), "betas": list(self.betas), "profile": profile}


_COUNTS = (
    *("pack_tokens", "micro_batch_size", "tensor_parallel", "dp_replicate", "keep_checkpoints", "log_every"),
    *("steps", "max_tokens", "dp_shard", "save_every", "stop_after", "evaluate_every"),  # may be None
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
        raise RecipeError(f"{where}.{unknown[0]}: unknown key{suggest(str(unknown[0]), known, value)}")
    try:
        return kind(**value)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error
