"""Linear layers that predict a view's targets from an encoder's features; their loss trains SPHINX-nano's encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sphinxkit.encoders.base import Encoder
from sphinxkit.encoders.convnext import ConvNextEncoder
from sphinxkit.features import VisionFeatures
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.nano.perception.targets import (
    BINS,
    CELLS,
    CHARACTERS,
    KINDS,
    MARKS,
    MAX_COUNT,
    NO_CHARACTER,
    NO_THING,
    THINGS,
)
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.shapes import SHAPES

EARLY_STAGE = 2
"""Stage of a ConvNeXt whose map is twice as fine as its features'."""

_POINTS = len(COCO_KEYPOINTS)
_MARKS = (MARKS // CELLS) ** 2
_SIZES = (len(THINGS) + 1, len(COLORS) + 1, 4 * (BINS + 1), 2 * _POINTS, _POINTS, _MARKS * (len(CHARACTERS) + 1))
_COUNT_SIZES = (len(KINDS), *(MAX_COUNT + 1 for _ in range(5)))


class Probe(nn.Module):
    """Predicts the targets from one encoder's features: a norm and a linear layer for cells, another for the view.

    Letters are smaller than cells, so a ConvNeXt also predicts them after the stage whose map is as fine.

    Args:
        encoder: The encoder; the probe hooks into a ConvNeXt's stage until ``release``.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.side = encoder.grid_size[0]
        dim = encoder.embed_dim
        self.cells = nn.Linear(dim, (CELLS // self.side) ** 2 * sum(_SIZES)) if self.side else None
        self.cell_norm = nn.LayerNorm(dim)
        self.whole_norm = nn.LayerNorm(dim * encoder.num_prefix_tokens)
        self.whole = nn.Linear(dim * encoder.num_prefix_tokens, sum(_COUNT_SIZES) + len(COLORS) * len(SHAPES))
        self.early: Tensor | None = None
        self.hook: RemovableHandle | None = None
        if isinstance(encoder, ConvNextEncoder) and 2 * self.side == MARKS:
            trunk: Any = encoder.trunk
            stage = trunk.stages[EARLY_STAGE]
            early_dim = stage.downsample[-1].out_channels
            self.early_marks = nn.Sequential(nn.LayerNorm(early_dim), nn.Linear(early_dim, len(CHARACTERS) + 1))
            self.hook = stage.register_forward_hook(self._keep_early)

    def release(self) -> None:
        """Remove the hook from the encoder."""
        if self.hook is not None:
            self.hook.remove()

    def _keep_early(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.early = output

    def forward(self, features: VisionFeatures, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses by target, and metrics: the share of right predictions and the mean errors (see ``is_metric``).

        Args:
            features: The encoder's features of a batch of views.
            targets: Fields of ``targets.Targets``, one row for each view.
        Shape:
            features: patches (B, H*W, D), prefix (B, P, D)
            return: scalars
        """
        found = self._read_whole(features.prefix, targets)
        if self.cells is not None:
            found |= self._read_cells(self.cells(self.cell_norm(features.patches)), targets)
        if self.early is not None:
            marks = self.early_marks(self.early.permute(0, 2, 3, 1)).flatten(0, 2)
            found |= {f"early_{name}": loss for name, loss in _read_marks(marks, targets).items()}
            self.early = None
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
            "right_things": (thing[covered].argmax(1) == wanted["thing"][covered]).float().mean(),
            "right_colors": (color[covered].argmax(1) == wanted["color"][covered]).float().mean(),
            "edge_error": (edges.argmax(1) - wanted["box"][covered].flatten()).abs().float().mean(),
            "point_error": (distance * seen_points).sum() / seen_points.sum().clamp(min=1),
            **_read_marks(marks, targets),
        }


def _read_marks(marks: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    letters = targets["characters"].flatten()
    written = letters != NO_CHARACTER
    return {
        "written": 3 * _loss(marks[written], letters[written]),
        "blank": _loss(marks[~written], letters[~written]),
        "right_letters": (marks[written].argmax(1) == letters[written]).float().mean(),
    }


def _loss(scores: Tensor, wanted: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy; 0 without targets."""
    if not len(wanted):
        return scores.float().sum() * 0.0
    return F.cross_entropy(scores.float(), wanted, label_smoothing=label_smoothing)


def is_metric(name: str) -> bool:
    """Whether a probe's value is logged but not in the loss."""
    return "right_" in name or name.endswith("_error")
