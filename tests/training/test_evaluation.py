"""A run is evaluated while it trains: held-out losses, benchmarks, boards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.errors import RecipeError
from sphinxkit.training import TrainPlan, read_log, train
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.log_records import EVALUATIONS_FILE
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.streams import Streams

# float32 sums in other groups; losses of about 5
LOSS_ATOL = 1e-5


@pytest.fixture
def evaluated(document: Callable[..., dict[str, Any]], samples: Path) -> Callable[..., dict[str, Any]]:
    """A plan that is evaluated on one benchmark of three questions, and on its own data."""
    annotations = samples / "questions.json"
    rows = [
        {"image": f"{n}.png", "question": "What number?", "gt_answers": "seven", "question_id": n} for n in range(3)
    ]
    annotations.write_text(json.dumps(rows))
    benchmark = {"benchmark": "vqa", "annotations": str(annotations), "images": str(samples), "batch_size": 2}

    def make(**changes: Any) -> dict[str, Any]:
        plan = document(**changes)
        held_out = {name: {**stream, "batch_size": 4} for name, stream in plan["data"].items()}
        return plan | {
            "evaluate_every": 4,
            "evaluate": {"data": held_out, "num_batches": 2, "benchmarks": {"numbers": benchmark}},
        }

    return make


def loss_of(model_folder: Path, plan: TrainPlan) -> dict[str, float]:
    """Mean loss per token of two batches of every held-out stream, sample by sample."""
    model = sphinxkit.load(model_folder, accelerate=None)
    assert plan.evaluate is not None
    document = plan.document()
    del document["kind"]
    held_out = TrainPlan(**document | {"data": document["evaluate"]["data"], "packing": False, "micro_batch_size": 1})
    vision = model.require_vision()
    streams = Streams(held_out, model, vision.num_tokens, ParallelDims(0, 1, torch.device("cpu")))
    sums = {name: [0.0, 0] for name in held_out.data}
    for _ in range(2):
        for name, batches in streams.read().batches.items():
            for batch in batches:
                rows = batch.image_rows if batch.pixels is not None else None
                with torch.no_grad():
                    total, count = model.loss(
                        batch.token_ids, batch.labels, batch.pixels, rows, batch.seq_lens, reduction="none"
                    )
                sums[name][0] += float(total)
                sums[name][1] += int(count)
    return {name: total / count for name, (total, count) in sums.items()}


def test_losses_and_scores_of_a_run(evaluated, straight: Path, recorder) -> None:
    kept = recorder()
    told: list[Any] = []
    kept.on_evaluation = told.append
    plan = TrainPlan(**evaluated(save_every=4, keep_checkpoints=2))
    run = Path(plan.output)
    half = run / "evaluation" / "model" / "model.safetensors"  # a run was killed while it removed its copy of the model
    half.parent.mkdir(parents=True)
    half.touch()
    assert train(plan, callbacks=[kept]).status == "done"
    records = read_log(run, EVALUATIONS_FILE)
    assert records == told
    assert [record["step"] for record in records] == [4, 8]
    for record in records:
        wanted = loss_of(sphinxkit.export(run, step=record["step"]), plan)
        assert record["losses"] == pytest.approx(wanted, abs=LOSS_ATOL)
        assert record["benchmarks"]["numbers"].keys() == {"accuracy", "vqa_accuracy"}
        answers = (run / "evaluation" / f"step-{record['step']:08d}" / "numbers.jsonl").read_text().splitlines()
        assert len(answers) == 3
    assert records[0]["losses"] != records[1]["losses"]
    assert not (run / "evaluation" / "model").exists()
    # evaluating changes nothing in the run
    keys = ("loss", "losses", "grad_norm", "lr", "data")
    assert [[r[key] for key in keys] for r in read_log(run)] == [[r[key] for key in keys] for r in read_log(straight)]
    rates = read_log(run)[0]["stream_tokens_per_second"]
    assert rates.keys() == {"captions", "texts"}
    assert sum(rates.values()) == pytest.approx(read_log(run)[0]["tokens_per_second"])


def test_a_resumed_run_evaluates_its_steps_once(evaluated) -> None:
    plan = evaluated(save_every=3)
    plan["evaluate"].pop("benchmarks")
    train(TrainPlan(**plan, stop_after=3))
    train(TrainPlan(**plan))
    records = read_log(Path(plan["output"]), EVALUATIONS_FILE)
    assert [record["step"] for record in records] == [4, 8]
    assert "benchmarks" not in records[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": 4}, r"evaluate, evaluate_every: one says what, the other how often"),
        ({"evaluate_every": 0, "evaluate": {}}, r"evaluate_every: must be at least 1, got 0"),
        ({"evaluate_every": 1, "evaluate": {"num_batches": 0}}, r"num_batches and batch_size must be at least 1"),
        ({"evaluate_every": 1, "evaluate": {"dta": {}}}, r"evaluate\.dta: unknown key.*data"),
        ({"profile": [3, 2]}, r"profile: expected \[first, last\] steps, counted from 1, got \[3, 2\]"),
    ],
)
def test_plans_that_contradict_themselves(document, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainPlan(**document(**changes))


@pytest.mark.slow
def test_a_profile_of_some_steps(document) -> None:
    plan = document(profile=[2, 3], steps=4)
    train(TrainPlan(**plan))
    trace = json.loads((Path(plan["output"]) / "profile.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names
    steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 2


def test_wandb_that_is_not_installed(document, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match=r'not installed: pip install "sphinxkit\[wandb\]"'):
        train(TrainPlan(**document(wandb="project", steps=1)))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_offline(evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    plan = evaluated(wandb="sphinx", steps=4)
    plan["evaluate"].pop("benchmarks")
    train(TrainPlan(**plan, stop_after=2))
    train(TrainPlan(**plan))
    files = list(Path(plan["output"]).glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    identity = (Path(plan["output"]) / "wandb-id").read_text()
    assert all(file.name == f"run-{identity}.wandb" for file in files)
    assert b"evaluation/losses/captions" in files[-1].read_bytes() + files[0].read_bytes()


@pytest.mark.integration
def test_tensorboard_files(evaluated) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = evaluated(tensorboard=True, steps=4)
    plan["evaluate"].pop("benchmarks")
    train(TrainPlan(**plan))
    board = EventAccumulator(str(Path(plan["output"]) / "tensorboard"))
    board.Reload()
    losses = [event.value for event in board.Scalars("loss")]
    assert losses == pytest.approx([record["loss"] for record in read_log(Path(plan["output"]))])
    assert len(board.Scalars("evaluation/losses/captions")) == 1
