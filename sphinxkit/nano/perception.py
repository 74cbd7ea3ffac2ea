"""Trains SPHINX-nano's encoders from nothing, by dense supervision, before they are frozen as SPHINX has it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from sphinxkit.atomic import atomic_file
from sphinxkit.data.procedural import World
from sphinxkit.data.procedural.draws import Draws
from sphinxkit.data.procedural.palette import COLORS
from sphinxkit.data.procedural.shapes import SHAPES
from sphinxkit.encoders import Encoder
from sphinxkit.errors import RecipeError
from sphinxkit.features import VisionFeatures
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.nano.targets import (
    BINS,
    CELLS,
    CHARACTERS,
    KINDS,
    MARKS,
    MAX_COUNT,
    NO_CHARACTER,
    NO_THING,
    THINGS,
    View,
    make_targets,
)
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD, resize_pixels
from sphinxkit.training.optim import learning_rate

VIEW = 64
"""Side of a view in pixels."""

KIND_WEIGHTS = (("single", 1), ("shapes", 4), ("texts", 3), ("people", 3), ("mixed", 3), ("page", 2), ("chart", 2))
"""How often each kind of scene is shown; our choice."""

_POINTS = len(COCO_KEYPOINTS)
_MARKS = (MARKS // CELLS) ** 2
_SIZES = (len(THINGS) + 1, len(COLORS) + 1, 4 * (BINS + 1), 2 * _POINTS, _POINTS, _MARKS * (len(CHARACTERS) + 1))
_COUNT_SIZES = (len(KINDS), *(MAX_COUNT + 1 for _ in range(5)))


@dataclass(frozen=True, slots=True)
class PerceptionPlan:
    """How the encoders are trained; all of it our choice.

    Args:
        steps: Batches.
        batch_size: Views in a batch.
        lr: Peak of the learning rate, which falls by a cosine to 0.
        warmup: Steps in which it rises.
        weight_decay: On matrices.
        clip: Largest norm of the gradients.
        seed: Of weights and scenes.
        workers: Processes that draw scenes.
        save_every: Steps between saved states.
    """

    steps: int = 1800
    batch_size: int = 128
    lr: float = 1.5e-3
    warmup: int = 60
    weight_decay: float = 0.05
    clip: float = 10.0
    seed: int = 0
    workers: int = 1
    save_every: int = 200


class Views(Dataset[dict[str, Any]]):
    """View ``index``: a whole picture of 64 pixels, or a picture of 128 made smaller, or a quarter of one.

    Args:
        seed: Another seed, other scenes.
        split: Of the scenes.
    """

    def __init__(self, seed: int, split: str = "train") -> None:
        self.seed, self.split = seed, split
        self.worlds = {
            (domain, side): World(domain, split, side, seed) for domain in ("real", "synthetic") for side in (64, 128)
        }

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = Draws("nano.views", self.seed, self.split, index)
        how = draws.weighted((("whole", 6), ("shrunk", 2), ("quarter", 2)))
        world = self.worlds[draws.choice(("real", "synthetic")), VIEW if how == "whole" else 2 * VIEW]
        scene = world.scene_of_kind(index, draws.weighted(KIND_WEIGHTS))
        left, top = (VIEW * draws.below(2), VIEW * draws.below(2)) if how == "quarter" else (0, 0)
        side = 2 * VIEW if how == "shrunk" else VIEW
        pixels = torch.from_numpy(scene.image[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        pixels = (pixels.float() / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        if side != VIEW:
            pixels = resize_pixels(pixels[None], (VIEW, VIEW), "bicubic")[0]
        found = asdict(make_targets(scene, View(left, top, side)))
        return {"pixels": pixels, **{name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}}


class Probe(nn.Module):
    """Reads the targets off one encoder's features: a norm and a linear layer for cells, another for the whole view.

    Args:
        encoder: Whose features they are.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.side = encoder.grid_size[0]
        dim = encoder.embed_dim
        self.cells = nn.Linear(dim, (CELLS // self.side) ** 2 * sum(_SIZES)) if self.side else None
        self.cell_norm = nn.LayerNorm(dim)
        self.whole_norm = nn.LayerNorm(dim * encoder.num_prefix_tokens)
        self.whole = nn.Linear(dim * encoder.num_prefix_tokens, sum(_COUNT_SIZES) + len(COLORS) * len(SHAPES))

    def forward(self, features: VisionFeatures, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses by target, and what share of the covered cells and marks is told rightly."""
        found = self._read_whole(features.prefix, targets)
        if self.cells is not None:
            found |= self._read_cells(self.cells(self.cell_norm(features.patches)), targets)
        return found

    def _read_whole(self, prefix: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read = self.whole(self.whole_norm(prefix.flatten(1))).float()
        *counts, pairs = torch.split(read, [*_COUNT_SIZES, len(COLORS) * len(SHAPES)], dim=1)
        losses = [F.cross_entropy(scores, targets["counts"][:, index]) for index, scores in enumerate(counts)]
        right = [
            (scores.argmax(1) == targets["counts"][:, index]).float().mean() for index, scores in enumerate(counts)
        ]
        return {
            "counts": torch.stack(losses).mean(),
            "pairs": 10 * F.binary_cross_entropy_with_logits(pairs, targets["pairs"]),
            "right_counts": torch.stack(right).mean(),
        }

    def _read_cells(self, read: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = CELLS // self.side
        read = read.view(len(read), self.side, self.side, part, part, -1).permute(0, 1, 3, 2, 4, 5)
        thing, color, box, points, seen, marks = torch.split(read.reshape(-1, sum(_SIZES)), list(_SIZES), dim=1)
        wanted = {name: targets[name].flatten(0, 1) for name in ("thing", "color", "box", "points", "point_seen")}
        covered = wanted["thing"] != NO_THING
        person = wanted["thing"] == THINGS.index("person")
        seen_points = wanted["point_seen"][person]
        marks = marks.reshape(len(targets["thing"]), CELLS, CELLS, MARKS // CELLS, MARKS // CELLS, -1)
        marks = marks.transpose(2, 3).reshape(-1, len(CHARACTERS) + 1)
        letters = targets["characters"].flatten()
        written = letters != NO_CHARACTER
        edges = box[covered].view(-1, BINS + 1).float()
        distance = (points[person].view(-1, _POINTS, 2).float() - wanted["points"][person]).abs().mean(-1)
        return {
            "thing": 2 * _loss(thing[covered], wanted["thing"][covered]),
            "nothing": _loss(thing[~covered], wanted["thing"][~covered]),
            "color": 0.5 * _loss(color[covered], wanted["color"][covered]),
            "box": 0.5 * _loss(edges, wanted["box"][covered].flatten(), label_smoothing=0.05),
            "points": 10 * (distance * seen_points).sum() / seen_points.sum().clamp(min=1),
            "seen": 0.2 * F.binary_cross_entropy_with_logits(seen[person].float(), seen_points.float())
            if len(seen_points)
            else seen.sum() * 0.0,
            "written": 3 * _loss(marks[written], letters[written]),
            "blank": _loss(marks[~written], letters[~written]),
            "right_things": (thing[covered].argmax(1) == wanted["thing"][covered]).float().mean(),
            "right_colors": (color[covered].argmax(1) == wanted["color"][covered]).float().mean(),
            "right_letters": (marks[written].argmax(1) == letters[written]).float().mean(),
            "edge_error": (edges.argmax(1) - wanted["box"][covered].flatten()).abs().float().mean(),
            "point_error": (distance * seen_points).sum() / seen_points.sum().clamp(min=1),
        }


def _loss(scores: Tensor, wanted: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy; 0 where nothing is wanted."""
    if not len(wanted):
        return scores.float().sum() * 0.0
    return F.cross_entropy(scores.float(), wanted, label_smoothing=label_smoothing)


def _batches(plan: PerceptionPlan, start: int) -> Iterator[dict[str, Tensor]]:
    size = plan.batch_size
    numbers = [list(range(step * size, (step + 1) * size)) for step in range(start, plan.steps)]
    loader = DataLoader(Views(plan.seed), batch_sampler=numbers, num_workers=plan.workers)
    yield from loader


@contextmanager
def _attention_by_products() -> Iterator[None]:
    """Fused attention's backward pass in bfloat16 is five times slower on a CPU than matrix products in bfloat16."""
    before: bool = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def train_encoders(
    encoders: Sequence[Encoder],
    plan: PerceptionPlan,
    folder: str | Path,
    should_stop: Callable[[], bool] | None = None,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> bool:
    """Train encoders side by side on the same views, each by its own probe; go on where a former call stopped.

    Args:
        encoders: Changed in place; they see views of ``VIEW`` pixels.
        plan: How.
        folder: For the state, ``state.pt``, and the log, ``log.jsonl``.
        should_stop: Asked behind every step; the state is saved before the function returns.
        report: Called with every record of the log.
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
    module.train().requires_grad_(True).to(memory_format=torch.channels_last)  # a quarter faster for ConvNeXt
    decayed = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    step = _restore(place / "state.pt", module, optimizer, plan)
    began, first = time.perf_counter(), step
    for batch in _batches(plan, step):
        found = []
        with torch.autocast("cpu", torch.bfloat16), _attention_by_products():
            pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
            for encoder, probe in zip(encoders, probes, strict=True):
                features = encoder(pixels)
                found.append(probe(features, batch))
        loss = torch.stack([value for values in found for name, value in values.items() if not _is_measure(name)]).sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(module.parameters(), plan.clip)
        rate = learning_rate(step, plan.steps, plan.lr, warmup=plan.warmup / plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        is_last = step == plan.steps or (should_stop is not None and should_stop())
        if step % 20 == 0 or is_last:
            record: dict[str, Any] = {
                "step": step,
                "loss": round(loss.item(), 4),
                "rate": _speed(step - first, plan, began),
            }
            for encoder, values in zip(encoders, found, strict=True):
                record[encoder.name] = {
                    name: round(value.item(), 4) for name, value in values.items() if _is_measure(name)
                }
            with (place / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            if report is not None:
                report(record)
        if step % plan.save_every == 0 or is_last:
            state = {
                "step": step,
                "plan": asdict(plan),
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            with atomic_file(place / "state.pt") as file:
                torch.save(state, file)
        if is_last:
            break
    for encoder in encoders:
        encoder.trainable = False
        encoder.requires_grad_(False).eval()
    return step >= plan.steps


def _is_measure(name: str) -> bool:
    """Whether a probe's value is told and not learnt."""
    return name.startswith("right_") or name.endswith("_error")


def _speed(steps: int, plan: PerceptionPlan, began: float) -> float:
    return round(steps * plan.batch_size / (time.perf_counter() - began), 1)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, plan: PerceptionPlan) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    free = {"workers", "save_every"}
    changed = [name for name, value in asdict(plan).items() if name not in free and state["plan"][name] != value]
    if changed:
        raise RecipeError(f"{path}: was made by another plan; what differs: {', '.join(changed)}")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
