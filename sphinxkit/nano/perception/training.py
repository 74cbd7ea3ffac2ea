"""The training of SPHINX-nano's encoders, from random weights, by dense supervision; SPHINX then freezes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from sphinxkit.atomic import atomic_file
from sphinxkit.encoders.base import Encoder
from sphinxkit.errors import RecipeError
from sphinxkit.nano.perception.probe import Probe, is_metric
from sphinxkit.nano.perception.targets import View, make_targets
from sphinxkit.nano.world import World
from sphinxkit.nano.world.render import render
from sphinxkit.nano.world.rng import Rng
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, resize_pixels
from sphinxkit.training.log import RunLog
from sphinxkit.training.muon import MuonAdamW
from sphinxkit.training.optim import learning_rate
from sphinxkit.training.signals import Signals

VIEW = 64
"""Side of a view in pixels."""

LAYER_SCALE = 0.5
"""Initial value of layer scales. ConvNeXt's 1e-6 is made for deep networks; shallow ones learn too slowly with it."""

LOG_EVERY = 20
STATE_FILE = "state.pt"

KIND_WEIGHTS = (
    ("single", 1),
    ("shapes", 4),
    ("texts", 2),
    ("poster", 4),
    ("people", 3),
    ("mixed", 3),
    ("page", 2),
    ("chart", 2),
)
"""How often each kind of scene is shown; our choice."""


@dataclass(frozen=True, slots=True)
class PerceptionPlan:
    """How the encoders are trained; all of it our choice.

    Args:
        steps: Number of batches.
        batch_size: Views in a batch.
        lr: Peak learning rate of the matrices (Muon); it falls by a cosine to 0.
        other_lr: Peak learning rate of all other parameters (AdamW).
        warmup_steps: Steps in which the learning rates rise.
        weight_decay: Weight decay of matrices.
        max_grad_norm: Largest norm of the gradients.
        seed: Seed of weights and scenes.
        num_workers: Processes that draw scenes.
        save_every: Steps between saved states.
    """

    steps: int = 2400
    batch_size: int = 64
    lr: float = 1e-2
    other_lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 10.0
    seed: int = 0
    num_workers: int = 1
    save_every: int = 200


class Views(Dataset[dict[str, Any]]):
    """Views of the training split with their targets; view ``index`` is a function of the seed and ``index`` alone.

    A view is a whole picture of 64 pixels, or a picture of 128 pixels made smaller, or a quarter of one.

    Args:
        seed: Seed of the scenes.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.worlds = {
            (domain, side): World(domain, "train", side, seed) for domain in ("real", "synthetic") for side in (64, 128)
        }

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Rng("nano.views", self.seed, "train", index)
        how = rng.weighted((("whole", 6), ("shrunk", 2), ("quarter", 2)))
        world = self.worlds[rng.choice(("real", "synthetic")), VIEW if how == "whole" else 2 * VIEW]
        scene = world.scene_of_kind(index, rng.weighted(KIND_WEIGHTS))
        left, top = (VIEW * rng.below(2), VIEW * rng.below(2)) if how == "quarter" else (0, 0)
        side = 2 * VIEW if how == "shrunk" else VIEW
        pixels = torch.from_numpy(render(scene)[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        pixels = (pixels.float() / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        if side != VIEW:
            pixels = resize_pixels(pixels[None], (VIEW, VIEW), "bicubic")[0]
        found = asdict(make_targets(scene, View(left, top, side)))
        return {"pixels": pixels, **{name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}}


def _batches(plan: PerceptionPlan, start: int) -> Iterator[dict[str, Tensor]]:
    size = plan.batch_size
    numbers = [list(range(step * size, (step + 1) * size)) for step in range(start, plan.steps)]
    loader = DataLoader(Views(plan.seed), batch_sampler=numbers, num_workers=plan.num_workers)
    yield from loader


@contextmanager
def _arithmetic(device: torch.device) -> Iterator[None]:
    """Bfloat16 autocast. On a CPU without fused attention, whose backward pass is five times slower there."""
    if device.type != "cpu":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    before: bool = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def train_encoders(
    encoders: Sequence[Encoder],
    plan: PerceptionPlan,
    folder: str | Path,
    should_stop: Callable[[], bool] | None = None,
    report: Callable[[Mapping[str, Any]], None] | None = None,
    device: str | torch.device = "cpu",
) -> bool:
    """Train encoders side by side on the same views, each by its own probe; resume where an earlier call stopped.

    Args:
        encoders: Changed in place; they see views of ``VIEW`` pixels.
        plan: How they are trained.
        folder: Folder of the state, ``state.pt``, and the log, ``log.jsonl``.
        should_stop: Asked after every step; the state is saved before the function returns.
        report: Called with every record of the log, and ``num_steps`` and ``seconds_left`` of this stage.
        device: Device of the training; the encoders end on the CPU. Not yet run on CUDA.
    Returns:
        Whether all steps are done.
    Raises:
        RecipeError: The folder holds the state of another plan.
    """
    torch.manual_seed(plan.seed)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    probes = [Probe(encoder) for encoder in encoders]
    module = nn.ModuleDict({"encoders": nn.ModuleList(encoders), "probes": nn.ModuleList(probes)})
    for encoder in encoders:
        encoder.trainable = True
    target = torch.device(device)
    module.train().requires_grad_(True).to(target)
    module.to(memory_format=torch.channels_last)  # a quarter faster for ConvNeXt
    for encoder in encoders:
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, LAYER_SCALE)
    optimizer = _make_optimizer(encoders, module, plan)
    step = _restore(place / STATE_FILE, module, optimizer, plan)
    began, first = time.perf_counter(), step
    log = RunLog(place, step + 1)
    try:
        with Signals().caught() as signals:
            for drawn in _batches(plan, step):
                batch = {name: value.to(target) for name, value in drawn.items()}
                loss, found = _learn(encoders, probes, optimizer, batch, plan, step)
                step += 1
                is_last = step == plan.steps or signals.received is not None
                is_last = is_last or (should_stop is not None and should_stop())
                if step % LOG_EVERY == 0 or is_last:
                    record = _record(encoders, loss, found, step, _speed(step - first, plan, began))
                    log.on_step(record)
                    if report is not None:
                        left = (plan.steps - step) * (time.perf_counter() - began) / (step - first)
                        report(record | {"num_steps": plan.steps, "seconds_left": left})
                if step % plan.save_every == 0 or is_last:
                    _save(place / STATE_FILE, module, optimizer, plan, step)
                if is_last:
                    break
    finally:
        log.on_end()
        for probe in probes:
            probe.release()
    for encoder in encoders:
        encoder.trainable = False
        encoder.requires_grad_(False).eval().to("cpu")
    return step >= plan.steps


def _make_optimizer(encoders: Sequence[Encoder], module: nn.Module, plan: PerceptionPlan) -> MuonAdamW:
    """Muon for the matrices inside the encoders; AdamW for kernels, embeddings, vectors and probes."""
    named = [item for encoder in encoders for item in encoder.named_parameters()]
    inside = [p for name, p in named if p.dim() == 2 and "embed" not in name and "query_tokens" not in name]
    known = {id(parameter) for parameter in inside}
    others = [parameter for parameter in module.parameters() if id(parameter) not in known]
    groups = [
        {"params": inside, "weight_decay": plan.weight_decay, "muon": True, "peak": plan.lr},
        {
            "params": [p for p in others if p.dim() > 1],
            "weight_decay": plan.weight_decay,
            "muon": False,
            "peak": plan.other_lr,
        },
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "muon": False, "peak": plan.other_lr},
    ]
    return MuonAdamW(groups, betas=(0.9, 0.98), fused=True)


def _learn(
    encoders: Sequence[Encoder],
    probes: Sequence[Probe],
    optimizer: MuonAdamW,
    batch: Mapping[str, Tensor],
    plan: PerceptionPlan,
    step: int,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """One step: its loss, and the values of each probe."""
    found = []
    with _arithmetic(batch["pixels"].device):
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        for encoder, probe in zip(encoders, probes, strict=True):
            found.append(probe(encoder(pixels), batch))
    loss = torch.stack([value for values in found for name, value in values.items() if not is_metric(name)]).sum()
    torch.autograd.backward(loss)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, plan.steps, group["peak"], warmup_ratio=plan.warmup_steps / plan.steps)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), found


def _record(
    encoders: Sequence[Encoder], loss: Tensor, found: Sequence[Mapping[str, Tensor]], step: int, rate: float
) -> dict[str, Any]:
    measures = {
        encoder.name: {name: round(value.item(), 4) for name, value in values.items() if is_metric(name)}
        for encoder, values in zip(encoders, found, strict=True)
    }
    return {"step": step, "loss": round(loss.item(), 4), "rate": rate, **measures}


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, plan: PerceptionPlan, step: int) -> None:
    state = {"step": step, "plan": asdict(plan), "module": module.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_file(path) as file:
        torch.save(state, file)


def _speed(steps: int, plan: PerceptionPlan, began: float) -> float:
    return round(steps * plan.batch_size / (time.perf_counter() - began), 1)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, plan: PerceptionPlan) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    free = {"num_workers", "save_every"}
    changed = [name for name, value in asdict(plan).items() if name not in free and state["plan"].get(name) != value]
    if changed:
        raise RecipeError(f"{path}: was made by another plan; what differs: {', '.join(changed)}")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
