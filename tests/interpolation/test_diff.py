from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from sphinxkit.interpolation.diff import compare, heat_map, layer_of
from sphinxkit.tensor_source import MappingSource

FLOAT64_ROUNDING = 1e-12  # sums of a few numbers in float64


def test_distances_by_hand() -> None:
    a = MappingSource({"llm.layers.0.w": torch.tensor([3.0, 4.0]), "llm.layers.0.v": torch.tensor([0.0])})
    b = MappingSource({"llm.layers.0.w": torch.tensor([3.0, -4.0]), "llm.layers.0.v": torch.tensor([6.0])})
    report = compare(a, b)
    w, v = report.tensors
    # difference (0, 8); |a| = 5; cosine (9 - 16) / 25
    assert (w.l2, w.relative_l2, w.max_abs, w.numel) == (8.0, 1.6, 8.0, 2)
    assert w.cosine == pytest.approx(-7 / 25, abs=FLOAT64_ROUNDING)
    assert (v.l2, v.relative_l2) == (6.0, math.inf)
    assert math.isnan(v.cosine)
    (layer,) = report.layers  # (0, 8, 6) has length 10, over |a| = 5
    assert (layer.name, layer.l2, layer.relative_l2, layer.max_abs) == ("llm.layers.0", 10.0, 2.0, 8.0)
    assert report.total.l2 == 10.0
    assert report.num_identical == 0


def test_equal_models(make_model: Callable[..., MappingSource]) -> None:
    seen: list[str] = []
    report = compare(make_model(0), make_model(0), progress=seen.append)
    assert (report.total.l2, report.total.max_abs) == (0.0, 0.0)
    assert report.total.cosine == pytest.approx(1, abs=FLOAT64_ROUNDING)
    assert report.num_identical == len(report.tensors) == len(seen) == 5
    zeros = MappingSource({"x": torch.zeros(3)})
    assert compare(zeros, zeros).total.cosine == 1.0


def test_what_is_not_in_both(make_model: Callable[..., MappingSource]) -> None:
    report = compare(make_model(0, vision__a=(2,), vision__c=(2,)), make_model(1, vision__b=(2,), vision__c=(3,)))
    assert report.only_first == ("vision.a",)
    assert report.only_second == ("vision.b",)
    assert report.shapes == {"vision.c": ((2,), (3,))}
    plain = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(plain)["shapes"] == {"vision.c": [[2], [3]]}


def test_chunks_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2**20 + 7, generator=generator) for _ in range(2))
    (distance,) = compare(MappingSource({"x": a}), MappingSource({"x": b})).tensors
    x, y = a.double(), b.double()
    assert distance.l2 == pytest.approx((x - y).norm().item(), rel=1e-9)  # another order of a million float64 sums
    assert distance.cosine == pytest.approx(((x @ y) / (x.norm() * y.norm())).item(), abs=1e-9)
    assert distance.max_abs == (x - y).abs().max().item()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llm.layers.3.mlp.up_proj.weight", ("llm.layers", 3, "mlp.up_proj.weight")),
        ("vision.branches.1.encoders.2.trunk.blocks.10.norm1.weight",
         ("vision.branches.1.encoders.2.trunk.blocks", 10, "norm1.weight")),
        ("vision.branches.1.encoders.1.trunk.stages.2.blocks.4.gamma",
         ("vision.branches.1.encoders.1.trunk.stages.2.blocks", 4, "gamma")),
        ("x.qformer.encoder.layer.0.output.bias", ("x.qformer.encoder.layer", 0, "output.bias")),
        ("llm.norm.weight", ("llm.norm", None, "weight")),
        ("bare", ("bare", None, "bare")),
    ],
)  # fmt: skip
def test_layers_by_name(name: str, expected: tuple[str, int | None, str]) -> None:
    assert layer_of(name) == expected


def test_heat_map_has_a_row_per_name_and_a_column_per_layer(make_model: Callable[..., MappingSource]) -> None:
    a, b = (make_model(seed, llm__layers__1__extra=(2,)) for seed in range(2))
    report = compare(a, b)
    rows, numbers, values = heat_map(report.tensors)["llm.layers"]
    assert (rows, numbers) == (["mlp.up_proj.weight", "extra"], [0, 1, 2])
    assert values[0] == [d.relative_l2 for d in report.tensors if "up_proj" in d.name]
    assert [math.isnan(value) for value in values[1]] == [True, False, True]
