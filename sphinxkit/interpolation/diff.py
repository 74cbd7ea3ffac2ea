"""Compares two models: distances per tensor and per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sphinxkit.interpolation.stream import CHUNK
from sphinxkit.tensor_source import TensorSource

_LAYER = re.compile(r"^(.*\.(?:layers?|blocks|resblocks|stages\.\d+\.blocks|stages)\.)([0-9]{1,9})\.(.+)$")


@dataclass(frozen=True)
class Distance:
    """How far two tensors, or groups of tensors, are apart.

    Attributes:
        name: Tensor or group.
        numel: Elements compared.
        l2: Euclidean norm of the difference.
        relative_l2: ``l2`` over the norm of the first; inf if that is 0 and the difference is not.
        cosine: Cosine of the angle between both as flat vectors; 1 if both are 0, NaN if one is.
        max_abs: Largest difference of an element.
    """

    name: str
    numel: int
    l2: float
    relative_l2: float
    cosine: float
    max_abs: float


@dataclass
class _Sums:
    numel: int = 0
    difference: float = 0.0
    first: float = 0.0
    second: float = 0.0
    dot: float = 0.0
    largest: float = 0.0

    def add(self, other: _Sums) -> None:
        self.numel += other.numel
        self.difference += other.difference
        self.first += other.first
        self.second += other.second
        self.dot += other.dot
        self.largest = max(self.largest, other.largest) if not math.isnan(other.largest) else math.nan

    def distance(self, name: str) -> Distance:
        l2, norm = math.sqrt(self.difference), math.sqrt(self.first)
        relative = l2 / norm if norm else (math.inf if l2 else 0.0)
        lengths = norm * math.sqrt(self.second)
        cosine = self.dot / lengths if lengths else 1.0 if self.first == self.second else math.nan
        if abs(cosine) > 1:  # rounding can lead a little beyond
            cosine = math.copysign(1.0, cosine)
        return Distance(name, self.numel, l2, relative, cosine, self.largest)


def _sums(a: Tensor, b: Tensor) -> _Sums:
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    sums = _Sums()
    for start in range(0, flat_a.numel(), CHUNK):
        x, y = flat_a[start : start + CHUNK].double(), flat_b[start : start + CHUNK].double()
        difference = x - y
        sums.add(
            _Sums(
                x.numel(),
                torch.dot(difference, difference).item(),
                torch.dot(x, x).item(),
                torch.dot(y, y).item(),
                torch.dot(x, y).item(),
                difference.abs().max().item(),
            )
        )
    return sums


def layer_of(name: str) -> tuple[str, int | None, str]:
    """The stack a tensor belongs to, the number of its layer in it, and its name within the layer.

    ``llm.layers.3.mlp.up_proj.weight`` is in stack ``llm.layers``, layer 3, as ``mlp.up_proj.weight``. A tensor that
    is in no layer belongs to the module that holds it, with no number.
    """
    found = _LAYER.match(name)
    if found:
        return found[1].rstrip("."), int(found[2]), found[3]
    module, _, leaf = name.rpartition(".")
    return module or name, None, leaf


@dataclass(frozen=True)
class DiffReport:
    """The distances between two models.

    Attributes:
        tensors: One per tensor that both hold in one shape, in the first model's order.
        layers: One per layer, and one per module outside the layers, over all their tensors.
        total: Over everything.
        only_first: Names that only the first model holds.
        only_second: Names that only the second model holds.
        shapes: Name -> the two shapes, where they differ.
        num_identical: How many tensors are equal in value, element by element.
    """

    tensors: tuple[Distance, ...]
    layers: tuple[Distance, ...]
    total: Distance
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    num_identical: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that JSON has no word for (NaN, Inf) become null."""

        def plain(distance: Distance) -> dict[str, Any]:
            fields = asdict(distance)
            return {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in fields.items()
            }

        return {
            "total": plain(self.total),
            "layers": [plain(layer) for layer in self.layers],
            "tensors": [plain(tensor) for tensor in self.tensors],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "shapes": {name: [list(a), list(b)] for name, (a, b) in self.shapes.items()},
            "num_identical": self.num_identical,
        }


def compare(first: TensorSource, second: TensorSource, *, progress: Callable[[str], None] | None = None) -> DiffReport:
    """Measure how far two models are apart, tensor by tensor, in float64 and constant memory.

    Args:
        first: The one that relative distances refer to.
        second: The other.
        progress: Told the name of each tensor that is done.
    Shape:
        of one name: any; different ones are reported
    """
    names = list(first.keys())
    others = set(second.keys())
    tensors, shapes, identical = [], {}, 0
    groups: dict[str, _Sums] = {}
    total = _Sums()
    for name in names:
        if name not in others:
            continue
        mine, theirs = tuple(first.shape(name)), tuple(second.shape(name))
        if mine != theirs:
            shapes[name] = mine, theirs
            continue
        sums = _sums(first.read(name), second.read(name))
        identical += sums.difference == 0
        tensors.append(sums.distance(name))
        stack, number, _ = layer_of(name)
        groups.setdefault(stack if number is None else f"{stack}.{number}", _Sums()).add(sums)
        total.add(sums)
        if progress:
            progress(name)
    held = set(names)
    return DiffReport(
        tuple(tensors),
        tuple(sums.distance(name) for name, sums in groups.items()),
        total.distance("total"),
        tuple(name for name in names if name not in others),
        tuple(name for name in second.keys() if name not in held),  # noqa: SIM118
        shapes,
        identical,
    )


def heat_map(distances: Iterable[Distance]) -> dict[str, tuple[list[str], list[int], list[list[float]]]]:
    """Relative L2 per stack of layers as a table: stack -> (names within a layer, layer numbers, rows of values).

    Cells of a name that a layer does not have are NaN. Tensors outside the layers are left out.
    """
    stacks: dict[str, dict[str, dict[int, float]]] = {}
    for distance in distances:
        stack, number, leaf = layer_of(distance.name)
        if number is not None:
            stacks.setdefault(stack, {}).setdefault(leaf, {})[number] = distance.relative_l2
    tables = {}
    for stack, rows in stacks.items():
        numbers = sorted({number for row in rows.values() for number in row})
        values = [[row.get(number, math.nan) for number in numbers] for row in rows.values()]
        tables[stack] = list(rows), numbers, values
    return tables
