"""Several processes compute what one computes; every run is a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit.recipe import build
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training import LossModule, TrainingError, TrainPlan, read_log, train
from sphinxkit.training.log_records import EVALUATIONS_FILE
from sphinxkit.training.parallel import ParallelDims, check_tensor_parallel, mesh_sizes
from sphinxkit.training.run_lock import lock_folder
from sphinxkit.training.sharding import parallelize
from sphinxkit.training.state import saved_steps
from sphinxkit.training.trainable_model import choose_trained

# float32 sums in another order, carried through 20 steps of Adam on losses of 5 to 6
CURVE_ATOL = 1e-4
RESUME_ATOL = 1e-5  # the same over the few steps after a resume
# bfloat16 has 8 bits of mantissa
BF16_ATOL = 5e-2

LAYOUTS = {"fsdp 2": (2, 1, 2, 1), "tp 2": (2, 1, 1, 2), "fsdp 2 x tp 2": (4, 1, 2, 2), "hsdp 2 x 2": (4, 2, 2, 1)}


def curve(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_parallel_equals_single(document, run_processes, tmp_path: Path) -> None:
    base = document(steps=20, save_every=None, pack_tokens=512)
    for stream in base["data"].values():
        stream["batch_size"] = 4
    run_processes(base | {"output": str(tmp_path / "one")})
    expected = curve(tmp_path / "one")
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 1
    for name, (processes, replicate, shard, tensor) in LAYOUTS.items():
        output = tmp_path / name
        sizes = {"dp_replicate": replicate, "dp_shard": shard, "tensor_parallel": tensor}
        run_processes(base | {"output": str(output)} | sizes, processes)
        assert curve(output) == pytest.approx(expected, abs=CURVE_ATOL), name


@pytest.mark.distributed
def test_a_run_of_two_goes_on_with_one_and_with_four(document, straight: Path, run_processes, tmp_path: Path) -> None:
    base = document(steps=8, save_every=None, async_save=True, export=True)
    expected = read_log(straight)
    output = tmp_path / "two"
    run_processes(base | {"output": str(output), "stop_after": 3}, 2)
    run_processes(base | {"output": str(output), "stop_after": 5}, 1)
    run_processes(base | {"output": str(output), "dp_shard": 2, "tensor_parallel": 2}, 4)
    found = read_log(output)
    assert [record["step"] for record in found] == list(range(8))
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([r[key] for r in expected], abs=RESUME_ATOL), key
    # of the samples of all processes, not of the first one's
    assert [record["data"] for record in found] == [record["data"] for record in expected]
    one, two = (sphinxkit.load(folder / "model").state_dict() for folder in (straight, output))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.distributed
def test_weights_from_a_checkpoint_are_spread(document, run_processes, tmp_path: Path) -> None:
    """The language model is never whole in one process: what it computes must be the same."""
    model = build(document()["model"], tokenizer=Tokenizer(document()["tokenizer"]))
    model.save(tmp_path / "init")
    base = document(
        steps=2, save_every=None, init_from=str(tmp_path / "init"), allow_random_encoders=False, tokenizer=None
    )
    run_processes(base | {"output": str(tmp_path / "one")})
    run_processes(base | {"output": str(tmp_path / "four"), "dp_shard": 2, "tensor_parallel": 2, "lr": 1e-2}, 4)
    assert curve(tmp_path / "four") == pytest.approx(curve(tmp_path / "one"), abs=CURVE_ATOL)


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "atol"), [("float32", RESUME_ATOL), ("bfloat16", BF16_ATOL)])
def test_updates_of_a_complete_checkpoint_on_two(
    document, straight: Path, run_processes, tmp_path: Path, dtype: str, atol: float
) -> None:
    """Every process draws the same factors and keeps its part of them."""
    start = {"init_from": str(straight / "model"), "allow_random_encoders": False, "tokenizer": None, "dtype": dtype}
    base = document(**start, train=["projectors"], steps=4, save_every=None)
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    for name, changes in (("plain", {"steps": 1}), ("one", lora)):
        train(TrainPlan(**base | changes | {"output": str(tmp_path / name)}))
    run_processes(base | lora | {"output": str(tmp_path / "two")}, 2)
    assert curve(tmp_path / "two")[0] == pytest.approx(curve(tmp_path / "plain")[0], abs=atol)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=atol)
    assert curve(tmp_path / "two")[-1] < curve(tmp_path / "two")[0]


@pytest.mark.distributed
def test_a_run_of_two_is_refused_where_another_run_trains(document, run_processes, tmp_path: Path) -> None:
    plan = document(steps=2)
    with lock_folder(Path(plan["output"])):
        assert run_processes(plan, 2, kill="SIGKILL") == [1, 1]
    for rank in (0, 1):
        assert "is in use by another training run" in (tmp_path / f"process{rank}.log").read_text()


FULL_DISK = """
from pathlib import Path
rename = Path.rename
def fail(path, target):
    if Path(target).name == "step-00000006":
        raise OSError(28, "No space left on device")
    return rename(path, target)
Path.rename = fail
"""


@pytest.mark.distributed
@pytest.mark.parametrize("async_save", [False, True], ids=["waiting", "meanwhile"])
def test_a_checkpoint_that_the_first_process_cannot_finish_ends_both(
    document, run_processes, tmp_path: Path, async_save: bool
) -> None:
    plan = document(async_save=async_save)
    assert run_processes(plan, 2, kill="SIGKILL", setup=FULL_DISK) == [1, 1]
    for rank in (0, 1):
        told = (tmp_path / f"process{rank}.log").read_text()
        assert "step 6 could not be written" in told
        assert "the checkpoint of step 3 is intact" in told
    assert saved_steps(Path(plan["output"]) / "checkpoints") == [3]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [
        {"train": ["projectors", "image_delimiters"], "lora": {"rank": 2}},
        {"train": ["projectors"]},
        {"train": ["llm", "projectors", "image_delimiters", "encoders"]},
    ],
    ids=["lora", "projectors", "encoders"],
)
def test_variants_on_two(document, changes: dict[str, Any], run_processes, tmp_path: Path) -> None:
    """Also resumed by another number of processes, and exported."""
    base = document(steps=4, save_every=None, export=True, **changes)
    train(TrainPlan(**base | {"output": str(tmp_path / "one")}))
    run_processes(base | {"output": str(tmp_path / "two"), "stop_after": 2}, 2)
    train(TrainPlan(**base | {"output": str(tmp_path / "two")}))
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=RESUME_ATOL)
    one, two = (sphinxkit.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_on_several(document, run_processes, tmp_path: Path) -> None:
    """By FSDP and by tensor parallelism. Data-parallel processes take the balance loss each of its own batches."""
    base = document(steps=4, save_every=None, export=True)
    for name, processes, tensor, balance_weight in (("fsdp", 2, 1, 0.0), ("fsdp x tp", 4, 2, 0.0), ("tp", 2, 2, 2.0)):
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "load_balancing_weight": balance_weight}
        base["model"] = {**base["model"], "llm": {**base["model"]["llm"], "moe": moe}}
        if balance_weight or name == "fsdp":
            train(TrainPlan(**base | {"output": str(tmp_path / f"one {balance_weight}")}))
            expected = read_log(tmp_path / f"one {balance_weight}")
            one = sphinxkit.load(tmp_path / f"one {balance_weight}" / "model").state_dict()
            assert expected[-1]["loss"] < expected[0]["loss"]
        run_processes(base | {"output": str(tmp_path / name), "tensor_parallel": tensor}, processes)
        found = read_log(tmp_path / name)
        for key in ("loss", "grad_norm"):
            assert [record[key] for record in found] == pytest.approx([r[key] for r in expected], abs=CURVE_ATOL), name
        several = sphinxkit.load(tmp_path / name / "model").state_dict()
        assert all(torch.allclose(one[key], several[key], atol=1e-3) for key in one), name


@pytest.mark.distributed
def test_an_evaluation_on_two_equals_one(document, run_processes, tmp_path: Path) -> None:
    base = document(steps=4, evaluate_every=2)
    held_out = {name: {**stream, "batch_size": 6} for name, stream in base["data"].items()}
    base |= {"evaluate": {"data": held_out, "num_batches": 2}}
    train(TrainPlan(**base | {"output": str(tmp_path / "one")}))
    run_processes(base | {"output": str(tmp_path / "two")}, 2)
    run_processes(base | {"output": str(tmp_path / "bfloat16"), "dtype": "bfloat16"})
    one, two, narrow = (read_log(tmp_path / name, EVALUATIONS_FILE) for name in ("one", "two", "bfloat16"))
    assert [record["step"] for record in one] == [record["step"] for record in two] == [2, 4]
    for single, several, rounded in zip(one, two, narrow, strict=True):
        assert several["losses"] == pytest.approx(single["losses"], abs=RESUME_ATOL)
        assert rounded["losses"] == pytest.approx(single["losses"], abs=BF16_ATOL)


@pytest.mark.distributed
def test_bfloat16_keeps_float32_weights(document, straight: Path, run_processes, tmp_path: Path) -> None:
    """Also on one process, which then is a group of its own."""
    run_processes(document(output=str(tmp_path / "narrow"), dtype="bfloat16", async_save=True))
    wide, narrow = curve(straight), curve(tmp_path / "narrow")
    assert wide != narrow
    assert narrow == pytest.approx(wide, abs=BF16_ATOL)


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        (
            {"dp_replicate": 4},
            2,
            "dp_replicate x dp_shard x tensor_parallel is 4 x 1 x 1, but 2 processes were started",
        ),
        ({"dp_shard": 4}, 2, "dp_replicate x dp_shard x tensor_parallel is 1 x 4 x 1, but 2 processes were started"),
        ({"tensor_parallel": 4}, 4, "tensor_parallel 4 does not divide the model's 4 query and 2 key heads"),
    ],
)
def test_sizes_are_checked(document, changes: dict[str, Any], processes: int, message: str) -> None:
    def check(plan: TrainPlan) -> None:
        mesh_sizes(plan, processes)
        check_tensor_parallel(plan, num_heads=4, num_kv_heads=2)

    with pytest.raises(TrainingError, match=message):
        check(TrainPlan(**document(**changes)))


@pytest.mark.parametrize("trains", [True, False])
def test_encoders_trained_in_16_bit_on_a_cpu_attend_by_products(document, trains: bool) -> None:
    """torch's fused kernel has a slow backward pass there."""
    plan = TrainPlan(**document(dtype="bfloat16", train=["llm", "encoders"] if trains else ["llm"]))
    model = build(plan.model, tokenizer=Tokenizer(document()["tokenizer"]))
    assert model.vision is not None
    choose_trained(model, plan)
    encoder = model.vision.branches[0].encoders[0]
    fused = []
    encoder.trunk.ln_post.register_forward_hook(lambda *_: fused.append(torch.backends.cuda.flash_sdp_enabled()))
    parallelize(LossModule(model), model.llm, ParallelDims(0, 1, torch.device("cpu")), plan)
    encoder(torch.zeros(1, 3, 28, 28))
    assert fused == [not trains]
    assert torch.backends.cuda.flash_sdp_enabled()
