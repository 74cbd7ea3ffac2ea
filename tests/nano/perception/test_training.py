"""Training encoders by dense supervision: it learns, resumes bit for bit, and keeps plans apart."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sphinxkit.encoders import Encoder, create
from sphinxkit.errors import RecipeError
from sphinxkit.features import VisionFeatures
from sphinxkit.nano.perception.probe import Probe
from sphinxkit.nano.perception.targets import NO_CHARACTER, NO_THING
from sphinxkit.nano.perception.training import PerceptionPlan, Views, train_encoders

PLAN = PerceptionPlan(steps=12, batch_size=8, lr=1e-2, warmup_steps=2, num_workers=0, save_every=5)


def make_encoders(recipe: list[list[dict[str, Any]]]) -> list[Encoder]:
    torch.manual_seed(7)
    return [create(**{"name": entry["type"], **_options(entry)}) for branch in recipe for entry in branch]


def _options(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "type"}


@pytest.fixture(scope="module")
def recipe(micro_recipes: Path) -> list[list[dict[str, Any]]]:
    import yaml

    document = yaml.safe_load((micro_recipes / "model.yaml").read_text())
    return [branch["encoders"] for branch in document["vision"]["branches"]]


@pytest.fixture(scope="module")
def straight(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Encoder], list[Any]]:
    """A whole run: its folder, its encoders, its records."""
    folder = tmp_path_factory.mktemp("straight")
    encoders, records = make_encoders(recipe), []  # type: ignore[var-annotated]
    assert train_encoders(encoders, PLAN, folder, report=records.append)
    return folder, encoders, records


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Equal bit for bit on one thread; how threads share a bfloat16 sum is not the same in every call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def states(encoders: list[Encoder]) -> dict[str, torch.Tensor]:
    return nn.ModuleList(encoders).state_dict()


def test_encoders_learn_and_are_frozen_then(straight: Any, recipe: Any) -> None:
    folder, encoders, records = straight
    before = states(make_encoders(recipe))
    after = states(encoders)
    # every encoder has learnt; buffers and what no view reaches aside
    for index in range(4):
        assert any(not torch.equal(before[k], after[k]) for k in after if k.startswith(f"{index}."))
    assert all(not p.requires_grad for encoder in encoders for p in encoder.parameters())
    assert not any(encoder.trainable or encoder.training for encoder in encoders)
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert records == [record | {"num_steps": 12, "seconds_left": 0.0} for record in logged]
    assert [record["step"] for record in records] == [12]
    assert {"blip2_qformer", "clip_vit_large_patch14", "convnext_xxlarge"} < set(records[0])
    assert set(records[0]["blip2_qformer"]) == {"right_counts"}
    assert {"right_things", "right_letters", "edge_error"} < set(records[0]["clip_vit_large_patch14"])


def test_stopping_and_going_on_equals_going_straight(straight: Any, recipe: Any, tmp_path: Path) -> None:
    _, expected, records = straight
    told: list[Any] = []
    asked = iter([False, True])
    first = make_encoders(recipe)
    assert not train_encoders(first, PLAN, tmp_path, should_stop=lambda: next(asked), report=told.append)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    again = make_encoders(recipe)
    assert train_encoders(again, PLAN, tmp_path, report=told.append)
    assert [record["step"] for record in told] == [2, 12]
    assert told[1]["loss"] == records[0]["loss"] < told[0]["loss"]
    for name, tensor in states(expected).items():
        assert torch.equal(states(again)[name], tensor), name


def test_sigterm_saves_and_a_killed_run_writes_no_line_twice(straight: Any, recipe: Any, tmp_path: Path) -> None:
    _, expected, records = straight
    before = signal.getsignal(signal.SIGTERM)
    plan = replace(PLAN, save_every=100)
    calls: list[int] = []

    def signalled() -> bool:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    assert not train_encoders(make_encoders(recipe), plan, tmp_path, should_stop=signalled)
    assert signal.getsignal(signal.SIGTERM) is before
    assert 3 <= torch.load(tmp_path / "state.pt", weights_only=True)["step"] <= 4
    with (tmp_path / "log.jsonl").open("a") as log:  # of steps that were done, but not saved
        log.write(json.dumps({"step": 9}) + '\n{"step": 10, "lo')
    again = make_encoders(recipe)
    assert train_encoders(again, plan, tmp_path)
    told = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in told][1:] == [12]
    assert told[-1]["loss"] == records[0]["loss"]
    for name, tensor in states(expected).items():
        assert torch.equal(states(again)[name], tensor), name


def test_letters_are_asked_for_early_where_a_stage_is_as_fine(tmp_path: Path) -> None:
    torch.manual_seed(7)
    encoder = create("convnext_xxlarge", input_size=256, dims=[4, 4, 8, 8], depths=[0, 1, 1, 1])
    records: list[Any] = []
    assert train_encoders([encoder], replace(PLAN, steps=2, warmup_steps=1), tmp_path, report=records.append)
    assert "early_right_letters" in records[0]["convnext_xxlarge"]
    assert not encoder.trunk.stages[2]._forward_hooks
    scales = [parameter for name, parameter in encoder.named_parameters() if name.endswith("gamma")]
    assert len(scales) == 3
    assert all((scale - 0.5).abs().max() < 0.1 for scale in scales)


def test_a_run_that_is_done_changes_nothing(straight: Any, recipe: Any) -> None:
    folder, expected, _ = straight
    loaded = make_encoders(recipe)
    assert train_encoders(loaded, replace(PLAN, num_workers=1, save_every=1), folder)
    for name, tensor in states(expected).items():
        assert torch.equal(states(loaded)[name], tensor), name


def test_another_plan_is_refused(straight: Any, recipe: Any) -> None:
    folder, _, _ = straight
    with pytest.raises(RecipeError, match=r"state.pt: was made by another plan; what differs: lr, max_grad_norm"):
        train_encoders(make_encoders(recipe), replace(PLAN, lr=1e-3, max_grad_norm=2.0), folder)


def test_views_depend_on_their_number_alone() -> None:
    views, again = Views(3), Views(3)
    later = [views[number] for number in (4, 1)]
    for number, found in ((1, later[1]), (4, later[0])):
        expected = again[number]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(later[0]["pixels"], Views(4)[4]["pixels"])
    assert {tuple(Views(3)[number]["pixels"].shape) for number in range(12)} == {(3, 64, 64)}
    assert len(views) > 10**9


def test_views_without_anything_give_finite_losses(recipe: Any) -> None:
    encoder = make_encoders(recipe)[1]
    targets = {
        "thing": torch.full((2, 64), NO_THING),
        "color": torch.zeros(2, 64, dtype=torch.int64),
        "box": torch.zeros(2, 64, 4, dtype=torch.int64),
        "points": torch.zeros(2, 64, 17, 2),
        "point_seen": torch.zeros(2, 64, 17, dtype=torch.bool),
        "characters": torch.full((2, 256), NO_CHARACTER),
        "counts": torch.zeros(2, 6, dtype=torch.int64),
        "pairs": torch.zeros(2, 64),
    }
    side, dim = encoder.grid_size[0], encoder.embed_dim
    features = VisionFeatures(torch.randn(2, 1, dim), torch.randn(2, side * side, dim), (side, side))
    probe = Probe(encoder)
    found = probe(features, targets)
    losses = {name: value for name, value in found.items() if not name.startswith("right_") and "error" not in name}
    assert all(torch.isfinite(value) for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in probe.parameters() if p.grad is not None)


def test_a_probe_reads_each_cell_from_its_own_patch(recipe: Any) -> None:
    """Only the patch that covers a cell has an influence on what is told there."""
    encoder = make_encoders(recipe)[1]
    side, dim = encoder.grid_size[0], encoder.embed_dim
    targets = {name: torch.as_tensor(value)[None] for name, value in _one_cell().items()}
    patches = torch.randn(1, side * side, dim, requires_grad=True)
    found = Probe(encoder)(VisionFeatures(torch.randn(1, 1, dim), patches, (side, side)), targets)
    for name, place in (("thing", 2 * side + 3), ("written", 1 * side + 2)):
        (grad,) = torch.autograd.grad(found[name], patches, retain_graph=True)
        assert torch.nonzero(grad.abs().sum(-1)[0]).flatten().tolist() == [place], name


def _one_cell() -> dict[str, Any]:
    thing = torch.full((64,), NO_THING)
    thing[5 * 8 + 6] = 0  # row 5, column 6 of 8: of 4 x 4 patches row 2, column 3
    characters = torch.full((256,), NO_CHARACTER)
    characters[7 * 16 + 9] = 1  # row 7, column 9 of 16: row 1, column 2
    return {
        "thing": thing,
        "color": torch.zeros(64, dtype=torch.int64),
        "box": torch.zeros(64, 4, dtype=torch.int64),
        "points": torch.zeros(64, 17, 2),
        "point_seen": torch.zeros(64, 17, dtype=torch.bool),
        "characters": characters,
        "counts": torch.zeros(6, dtype=torch.int64),
        "pairs": torch.zeros(64),
    }


@pytest.mark.gpu
def test_a_gpu_trains_them_too(recipe: Any, tmp_path: Path) -> None:
    encoders, records = make_encoders(recipe), []  # type: ignore[var-annotated]
    assert train_encoders(encoders, replace(PLAN, steps=60), tmp_path, report=records.append, device="cuda")
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert all(not p.is_cuda for encoder in encoders for p in encoder.parameters())
