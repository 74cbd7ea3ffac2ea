"""Whole runs on one process: what they leave, and what they do with bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.recipe import build
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training import NonFiniteError, TrainingError, TrainPlan, read_log, train
from sphinxkit.training.feature_shards import ENTRY
from sphinxkit.training.flops import vision_flops

# float32 sums in another order, over a few steps
PACKING_ATOL = 1e-5
# bfloat16 has 8 bits; what is fused is rounded less often
BF16_ATOL = 5e-2


def test_what_a_run_leaves(straight: Path) -> None:
    records = read_log(straight)
    assert [record["step"] for record in records] == list(range(8))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    first = records[0]
    assert (first["samples"], first["images"], first["mfu"]) == (16, 8, None)
    assert first["losses"].keys() == first["learnt"].keys() == {"captions", "texts"}
    assert first["loss"] == pytest.approx((first["losses"]["captions"] + 0.5 * first["losses"]["texts"]) / 1.5)
    assert records[-1]["total"]["samples"] == 128
    assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = sphinxkit.load(straight / "model")
    assert model.tokenizer is not None
    assert model.generate(["What"], max_new_tokens=2)
    run = json.loads((straight / "checkpoints" / "step-00000008" / "run.json").read_text())
    assert run["step"] == run["num_steps"] == 8


def test_callbacks_are_told_the_time_left_and_the_utilisation(document, recorder) -> None:
    told = recorder()
    result = train(TrainPlan(**document(steps=3, log_every=2, peak_flops=1e12, save_every=1)), callbacks=[told])
    reports = told.records
    assert told.results == [result]
    assert [step for step, _ in told.checkpoints] == [1, 2, 3]
    assert told.checkpoints[-1][1] == result.folder / "checkpoints" / "step-00000003"
    assert [report["step"] for report in reports] == [1, 2]
    assert reports[0]["seconds_left"] > 0
    assert reports[1]["seconds_left"] == 0
    assert 0 < reports[0]["mfu"] < 1


def test_padded_rows_and_the_other_options_change_nothing(document, straight: Path, tmp_path: Path) -> None:
    options = {"packing": False, "micro_batch_size": 3, "activation_checkpointing": False}
    options |= {"encoder_cache": str(tmp_path / "cache"), "steps": 8, "stop_after": 3}
    train(TrainPlan(**document(**options)))
    expected = [record["loss"] for record in read_log(straight)][:3]
    records = read_log(Path(document()["output"]))
    assert [record["loss"] for record in records] == pytest.approx(expected, abs=PACKING_ATOL)
    keys = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.keys"))
    assert keys == 24 * ENTRY.size  # three batches of eight: each image once


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where it traces a layer
@pytest.mark.parametrize(("dtype", "atol"), [("float32", PACKING_ATOL), ("bfloat16", BF16_ATOL)])
def test_compiled_layers_change_nothing(document, tmp_path: Path, dtype: str, atol: float) -> None:
    counters = torch._dynamo.utils.counters
    curves = []
    for compiled in (False, True):
        counters.clear()
        output = tmp_path / f"compiled-{compiled}"
        train(TrainPlan(**document(steps=4, dtype=dtype, compile=compiled, output=str(output))))
        curves.append([record["loss"] for record in read_log(output)])
    # forward and backward of three kinds of modules, which all layers share; lengths are symbols, but for a few
    assert 3 <= counters["stats"]["unique_graphs"] <= 9
    assert not counters["graph_break"]
    assert curves[1] == pytest.approx(curves[0], abs=atol)


def test_encoders_can_be_trained(document) -> None:
    plan = TrainPlan(**document(train=["llm", "projectors", "image_delimiters", "encoders"], steps=2, export=True))
    train(plan)
    torch.manual_seed(plan.seed)
    start = build(plan.model, tokenizer=Tokenizer(plan.tokenizer)).state_dict()
    found = sphinxkit.load(Path(plan.output) / "model").state_dict()
    name = "vision.branches.0.encoders.0.trunk.conv1.weight"
    assert not torch.equal(found[name], start[name])


def test_epochs_of_the_first_stream_are_counted(document) -> None:
    result = train(TrainPlan(**document(steps=None, epochs=0.7)))
    assert result.num_steps == result.step == 2  # 24 captions in batches of 8
    with pytest.raises(TrainingError, match=r"0.1 epochs of 3 batches hold no step"):
        train(TrainPlan(**document(steps=None, epochs=0.1, output=str(Path(document()["output"]) / "other"))))


# -- where a run starts from ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, straight: Path) -> Path:
    """A checkpoint with a whole model."""
    return straight / "model"


def test_a_run_starts_from_a_checkpoint(document, start: Path, straight: Path) -> None:
    plan = TrainPlan(
        **document(init_from=str(start), allow_random_encoders=False, tokenizer=None, steps=1, warmup_ratio=0.0)
    )
    train(plan)
    [record] = read_log(Path(plan.output))
    assert record["loss"] < read_log(straight)[-1]["loss"] + 0.1


def test_projectors_may_be_new_but_not_frozen_encoders(document, start: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def without(prefix: str, name: str) -> str:
        folder = tmp_path / name
        tensors = load_file(start / "model.safetensors")
        source = sphinxkit.checkpoint.MappingSource({k: v for k, v in tensors.items() if not k.startswith(prefix)})
        recipe = (start / "recipe.yaml").read_text()
        sphinxkit.checkpoint.save(folder, source, recipe_yaml=recipe, tokenizer=start / "tokenizer.model")
        return str(folder)

    base = {"allow_random_encoders": False, "tokenizer": None, "steps": 1}
    new = without("vision.branches.0.projector", "new")
    assert train(TrainPlan(**document(init_from=new, **base))).status == "done"
    output = str(tmp_path / "refused")
    with pytest.raises(
        TrainingError, match=r"weights for the frozen vision.branches.0.encoders.0; name one in init_from"
    ):
        train(TrainPlan(**document(init_from=without("vision.branches.0.encoders", "blind"), output=output, **base)))
    with pytest.raises(TrainingError, match="none of the checkpoints holds a language model"):
        train(TrainPlan(**document(init_from=without("llm.", "mute"), output=output, **base)))
    with pytest.raises(CheckpointError, match=r"the language model is not complete, e.g. llm.norm.weight is missing"):
        train(TrainPlan(**document(init_from=without("llm.norm", "half"), output=output, **base)))
    with pytest.raises(TrainingError, match="weights for the frozen"):
        train(TrainPlan(**document(allow_random_encoders=False, output=output)))


def test_plans_that_cannot_start(document, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="tokenizer: neither the plan, nor the model's recipe, nor a checkpoint"):
        train(TrainPlan(**document(tokenizer=None)))
    plan = document()
    plan["data"]["texts"]["mixture"] = "sphinx_7b"
    with pytest.raises(RecipeError, match="expected kind mixture, got kind model"):
        train(TrainPlan(**plan))
    blind = {key: value for key, value in document()["model"].items() if key != "vision"}
    with pytest.raises(RecipeError, match="train: nothing of what is named is in the model"):
        train(TrainPlan(**document(model=blind, train=["projectors"])))
    with pytest.raises(RecipeError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        train(TrainPlan(**document(device="tpu")))
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="finds no CUDA device"):
            train(TrainPlan(**document(device="cuda")))


def test_tensorboard_that_is_not_installed(document, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="tensorboard: true, but it is not installed: pip install tensorboard"):
        train(TrainPlan(**document(tensorboard=True)))


def test_trained_encoders_count_in_the_utilisation(document, recorder, tmp_path: Path) -> None:
    told = recorder()
    for extra in ([], ["encoders"]):
        changes = {
            "train": ["llm", "projectors", "image_delimiters", *extra],
            "output": str(tmp_path / f"run{len(extra)}"),
        }
        train(TrainPlan(**document(steps=1, peak_flops=1.0, **changes)), callbacks=[told])
    frozen, trained = (record["mfu"] * record["seconds"] for record in told.records)
    forward = told.records[0]["images"] * vision_flops(build(document()["model"]))
    assert trained - frozen == pytest.approx(2 * forward)


def test_a_mixture_of_another_kind(document, straight: Path) -> None:
    """Whatever has a mixture's methods: here the same one by its import path."""
    plan = document(stop_after=2)
    for stream in plan["data"].values():
        stream["mixture"] = {"type": "sphinxkit.data.mixture:Mixture", **stream["mixture"]}
    train(TrainPlan(**plan))
    assert [r["data"] for r in read_log(Path(plan["output"]))] == [r["data"] for r in read_log(straight)][:2]


def test_a_model_without_a_template_cannot_be_trained(document) -> None:
    from sphinxkit.training.parallel import ParallelDims
    from sphinxkit.training.streams import Streams

    model = build(document()["model"])
    with pytest.raises(RecipeError, match="training needs a model with a tokenizer and a conversation template"):
        Streams(TrainPlan(**document()), model, 7, ParallelDims(0, 1, torch.device("cpu")))


def test_an_export_never_replaces_what_is_not_a_model(document) -> None:
    plan = TrainPlan(**document(steps=1, export=True))
    (Path(plan.output) / "model").mkdir(parents=True)
    (Path(plan.output) / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint but holds thesis.tex"):
        train(plan)
    assert (Path(plan.output) / "model" / "thesis.tex").exists()


def test_a_checkpoint_that_is_nowhere(document, start: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        train(TrainPlan(**document(init_from=str(tmp_path / "nowhere"))))
    damaged = Path(shutil.copytree(start, tmp_path / "damaged"))
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        train(TrainPlan(**document(init_from=str(damaged))))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_samples(document, samples: Path, tmp_path: Path) -> Any:
    """As ``document``, over samples that may be spoilt."""
    folder = Path(shutil.copytree(samples, tmp_path / "samples"))

    def make(**changes: Any) -> dict[str, Any]:
        plan = document(**changes)
        for name, stream in plan["data"].items():
            stream["mixture"]["sources"][0]["path"] = str(folder / f"{name}.jsonl")
            stream["mixture"]["max_bad_rate"] = 0.02  # two samples before the hundredth
        return plan

    return folder, make


def test_an_unreadable_image_is_left_out_and_told(own_samples) -> None:
    folder, make = own_samples
    (folder / "3.png").write_bytes(b"no picture")
    plan = TrainPlan(**make(steps=3))
    assert train(plan).status == "done"
    told = [bad for record in read_log(Path(plan.output)) for bad in record.get("bad", [])]
    assert [bad["id"] for bad in told] == ["captions:3"]
    assert "3.png" in told[0]["reason"]
    assert read_log(Path(plan.output))[-1]["total"]["bad"] == 1


def test_what_is_too_long_is_counted(own_samples, recorder) -> None:
    _, make = own_samples
    plan = make(steps=3, max_tokens=40)
    plan["data"]["captions"]["mixture"]["over_length"] = "skip"
    plan["data"]["texts"]["mixture"]["over_length"] = "truncate"
    told = recorder()
    assert train(TrainPlan(**plan), callbacks=[told]).status == "done"
    records = told.records
    total = records[-1]["total"]
    for key in ("too_long", "truncated"):
        assert total[key] == sum(record[key] for record in records) > 0
    assert all(record["samples"] + record["too_long"] == 16 for record in records)


def test_too_many_bad_samples_stop_the_run_with_its_state_intact(own_samples, straight: Path) -> None:
    folder, make = own_samples
    plan = make(stop_after=2)
    train(TrainPlan(**plan))
    good = {number: (folder / f"{number}.png").read_bytes() for number in range(24)}
    for number in good:
        (folder / f"{number}.png").write_bytes(b"no picture")
    del plan["stop_after"]
    with pytest.raises(Exception, match=r"step 3: mixture: \d+ of 24 samples are bad") as caught:
        train(TrainPlan(**plan))
    assert "the state before this step was saved" in str(caught.value)
    for number, content in good.items():
        (folder / f"{number}.png").write_bytes(content)
    assert train(TrainPlan(**plan)).status == "done"
    assert [r["loss"] for r in read_log(Path(plan["output"]))] == [r["loss"] for r in read_log(straight)]


def test_a_step_without_a_usable_sample_has_no_loss_and_updates_nothing(own_samples, recorder) -> None:
    folder, make = own_samples
    for number in range(24):
        (folder / f"{number}.png").write_bytes(b"no picture")
    plan = make(steps=2, export=True)
    del plan["data"]["texts"]
    plan["data"]["captions"]["mixture"]["max_bad_rate"] = 1.0
    told = recorder()
    assert train(TrainPlan(**plan), callbacks=[told]).status == "done"
    for record in read_log(Path(plan["output"])):
        assert "loss" not in record
        assert record["skipped"] == "no sample of this step has a token to learn"
        assert len(record["bad"]) == 8
    assert told.records[-1]["total"]["skipped_steps"] == 2
    torch.manual_seed(0)
    start = build(plan["model"], tokenizer=Tokenizer(plan["tokenizer"])).state_dict()
    found = sphinxkit.load(Path(plan["output"]) / "model").state_dict()
    assert all(torch.equal(found[name], start[name]) for name in start)
    plan |= {"steps": 20, "output": plan["output"] + "-long"}
    with pytest.raises(TrainingError, match="11 steps in a row updated nothing; the last: no sample of this step"):
        train(TrainPlan(**plan))


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The loss of these calls of the loss (two to a step here) is not a number."""
    from sphinxkit.training.step import LossModule

    original = LossModule.forward
    calls: list[int] = []

    def forward(self: Any, batch: Any) -> Any:
        calls.append(1)
        loss = original(self, batch)
        return loss * float("nan") if batch.image_rows and sum(1 for _ in calls) in steps else loss

    monkeypatch.setattr(LossModule, "forward", forward)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_state_intact(document, straight: Path, monkeypatch) -> None:
    plan = document(pack_tokens=2000, save_every=None)
    with monkeypatch.context() as patch:
        poison(patch, 5)  # the first pass of step 3
        with pytest.raises(NonFiniteError, match=r"step 3: the loss is not finite; samples .*captions:\d+") as caught:
            train(TrainPlan(**plan))
    assert "the state before this step was saved" in str(caught.value)
    assert train(TrainPlan(**plan)).status == "done"
    expected = [record["loss"] for record in read_log(straight)]
    assert [r["loss"] for r in read_log(Path(plan["output"]))] == pytest.approx(expected, abs=PACKING_ATOL)


def test_an_error_is_told_although_the_disk_is_full_too(document, monkeypatch) -> None:
    plan = TrainPlan(**document(pack_tokens=2000))
    poison(monkeypatch, 5)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("sphinxkit.training.state.shutil.disk_usage", lambda path: usage)
    message = r"(?s)step 3: the loss is not finite; samples .*could not be saved, either: .* step 2 .*the disk is full"
    with pytest.raises(NonFiniteError, match=message):
        train(plan)


def test_a_step_that_is_not_finite_can_be_skipped(document, monkeypatch) -> None:
    plan = document(pack_tokens=2000, on_nonfinite="skip")
    poison(monkeypatch, 5)
    assert train(TrainPlan(**plan)).status == "done"
    records = read_log(Path(plan["output"]))
    assert ["skipped" in record for record in records] == [False, False, True, *[False] * 5]
    assert "captions:" in records[2]["skipped"]
    assert records[-1]["total"]["skipped_steps"] == 1


def test_a_run_that_only_skips_stops(document, monkeypatch) -> None:
    poison(monkeypatch, *range(100))
    with pytest.raises(TrainingError, match="11 steps in a row updated nothing; the last: the loss is not finite"):
        train(TrainPlan(**document(pack_tokens=2000, on_nonfinite="skip", steps=30)))


class Suicide:
    """A template whose worker process dies, as the kernel kills it when memory runs out."""

    def encode(self, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker(document, monkeypatch) -> None:
    from sphinxkit.training import streams

    original = streams.ExampleMaker
    monkeypatch.setattr(streams, "ExampleMaker", lambda **options: original(**options | {"template": Suicide()}))
    with pytest.raises(TrainingError, match=r"step 1: data.captions: a worker process died .*num_workers: 0 reads"):
        train(TrainPlan(**document(num_workers=1)))
