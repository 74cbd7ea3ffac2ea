"""Runs that stop, are killed and go on."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

import sphinxkit
from sphinxkit.training import TrainingError, TrainPlan, read_log, train
from sphinxkit.training.log import RunLog

EXACT = ("step", "lr", "loss", "losses", "grad_norm", "data", "samples", "tokens")


def exact(folder: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in EXACT} for record in read_log(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(sphinxkit.load(folder / "model").state_dict())


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(document, straight: Path, run_processes) -> None:
    """Step 5 is lost: it was after the checkpoint of step 3."""
    plan = document(export=True)
    assert run_processes(plan, at=5, kill="SIGKILL") == [-signal.SIGKILL]
    output = Path(plan["output"])
    assert [record["step"] for record in read_log(output)] == [0, 1, 2, 3, 4]
    result = train(TrainPlan(**plan))
    assert (result.status, result.step) == ("done", 8)
    assert exact(output) == exact(straight)
    one, two = weights(straight), weights(output)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sigterm_saves_and_exits(document, recorder, straight: Path) -> None:
    plan = TrainPlan(**document(save_every=None))
    before = signal.getsignal(signal.SIGTERM)
    told = recorder(lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 3 else None)
    result = train(plan, callbacks=[told])
    assert (result.status, result.step, result.signal) == ("interrupted", 4, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(plan).status == "done"
    assert exact(Path(plan.output)) == exact(straight)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_is_not_a_dead_worker(document, recorder, straight: Path) -> None:
    """Ctrl-C and batch systems signal every process, those that read the data too."""

    def interrupt(record: Any) -> None:
        if record["step"] == 3:
            readers = multiprocessing.active_children()
            assert len(readers) == 2  # one for each stream
            for process in (*readers, multiprocessing.current_process()):
                os.kill(process.pid or 0, signal.SIGINT)

    plan = TrainPlan(**document(save_every=None, num_workers=1))
    result = train(plan, callbacks=[recorder(interrupt)])
    assert (result.status, result.step, result.signal) == ("interrupted", 4, signal.SIGINT)
    assert train(plan).status == "done"
    assert exact(Path(plan.output)) == exact(straight)


@pytest.mark.slow
def test_slices_are_one_run(document, straight: Path) -> None:
    for stop, status in ((2, "paused"), (2, "paused"), (8, "done")):
        assert train(TrainPlan(**document(stop_after=stop, num_workers=stop // 8, async_save=True))).status == status
    assert exact(Path(document()["output"])) == exact(straight)


def test_a_thread_that_is_not_the_main_one_trains(document) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(TrainPlan(**document(steps=1)))))
    thread.start()
    thread.join()
    assert results[0].status == "done"


def test_an_unfinished_checkpoint_is_not_resumed_from(document, straight: Path) -> None:
    """What a crash while saving leaves: a folder under its temporary name, and a log line cut in half."""
    plan = TrainPlan(**document(stop_after=6))
    train(plan)
    folder = Path(plan.output) / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / ".step-00000007.partial")
    (folder / ".step-00000007.partial" / ".metadata").unlink()
    with (Path(plan.output) / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert train(TrainPlan(**document())).step == 8
    assert exact(Path(plan.output)) == exact(straight)
    assert not list(folder.glob(".step-*"))


DIES_WHILE_WRITING = """
from pathlib import Path
from torch.distributed.checkpoint.filesystem import FileSystemWriter
writes, write_data = [], FileSystemWriter.write_data
def die(self, plan, planner):
    writes.append(1)
    if len(writes) == 2:
        (Path(self.path) / "__0_0.distcp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write_data(self, plan, planner)
FileSystemWriter.write_data = die
"""


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_the_save_before(
    document, straight: Path, run_processes, is_async: bool
) -> None:
    """The process dies inside the write of step 6; step 3 is whole."""
    plan = document(async_save=is_async)
    assert run_processes(plan, kill="SIGKILL", setup=DIES_WHILE_WRITING) == [-signal.SIGKILL]
    folder = Path(plan["output"]) / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000003"]
    assert list(folder.glob(".step-00000006*/*.distcp"))
    assert train(TrainPlan(**plan)).step == 8
    assert exact(Path(plan["output"])) == exact(straight)
    assert not list(folder.glob(".step-*"))


def fail_on(monkeypatch: pytest.MonkeyPatch, error: Exception, *, after: int) -> None:
    """The n-th write of a checkpoint fails halfway."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    original = FileSystemWriter.write_data
    calls = []

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            (Path(self.path) / "__0_0.distcp").write_bytes(b"half")
            raise error
        return original(self, plan, planner)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_leaves_the_previous_checkpoint(document, straight: Path, monkeypatch, async_save: bool) -> None:
    plan = document(async_save=async_save)
    with monkeypatch.context() as patch:
        fail_on(patch, OSError(28, "No space left on device"), after=1)
        message = (
            r"the checkpoint of step 6 could not be written .*: the disk is full .*; the checkpoint of step 3 is intact"
        )
        with pytest.raises(TrainingError, match=message):
            train(TrainPlan(**plan))
    folder = Path(plan["output"]) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert train(TrainPlan(**plan)).status == "done"
    assert exact(Path(plan["output"])) == exact(straight)


def test_a_disk_that_is_too_small_is_noticed_before(document, monkeypatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("sphinxkit.training.state.shutil.disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match=r"step 3 .*the disk is full .*GB are needed.*there is none before it"):
        train(TrainPlan(**document()))


def test_a_log_that_cannot_be_written(document, straight: Path, monkeypatch) -> None:
    """The step was done: its weights must not be saved as those of the step before."""
    plan = document()
    with monkeypatch.context() as patch:

        def write(self: RunLog, record: Any, original: Any = RunLog.on_step) -> None:
            if record["step"] == 4:
                self._steps.close()
                self._steps = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
            original(self, record)

        patch.setattr(RunLog, "on_step", write)
        with pytest.raises(TrainingError, match=r"full cannot be written: .*No space left on device"):
            train(TrainPlan(**plan))
    assert [path.name for path in (Path(plan["output"]) / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(TrainPlan(**plan)).status == "done"
    assert exact(Path(plan["output"])) == exact(straight)


def test_another_recipe_is_refused_with_the_keys(document) -> None:
    train(TrainPlan(**document(stop_after=2)))
    changed = document(lr=5e-3, betas=[0.9, 0.99], stop_after=None, keep_checkpoints=1, num_workers=1)
    changed["data"]["texts"]["weight"] = 0.25
    changed["model"] = json.loads(json.dumps(changed["model"]))
    with pytest.raises(TrainingError) as caught:
        train(TrainPlan(**changed))
    lines = str(caught.value).splitlines()
    assert "cannot be resumed from step 2: the recipe differs from the saved one:" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["betas", "data.texts.weight", "lr"]
    assert lines[-1].strip() == "lr: 0.01 -> 0.005"


def test_another_model_recipe_is_refused(document, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps(document()["model"]))
    train(TrainPlan(**document(model=str(path), stop_after=1)))
    changed = json.loads(path.read_text())
    changed["llm"]["rope_theta"] = 5e5
    path.write_text(json.dumps(changed))
    with pytest.raises(TrainingError, match=r"model:  llm.rope_theta: 10000.0 -> 500000.0"):
        train(TrainPlan(**document(model=str(path))))


def test_other_data_are_refused(document, samples: Path, tmp_path: Path) -> None:
    texts = Path(shutil.copy(samples / "texts.jsonl", tmp_path))
    plan = document(stop_after=2)
    plan["data"]["texts"]["mixture"]["sources"][0]["path"] = str(texts)
    train(TrainPlan(**plan))
    with texts.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(TrainingError, match=r"data.texts cannot go on .*: the content of .*texts.jsonl has changed"):
        train(TrainPlan(**plan))


def test_the_same_number_of_other_lines_is_refused_by_name(document, samples: Path, tmp_path: Path) -> None:
    texts = Path(shutil.copy(samples / "texts.jsonl", tmp_path))
    plan = document(stop_after=2)
    plan["data"]["texts"]["mixture"]["sources"][0]["path"] = str(texts)
    train(TrainPlan(**plan))
    texts.write_text("".join(reversed(texts.read_text().splitlines(keepends=True))))
    with pytest.raises(TrainingError, match=r"data.texts cannot go on .*: the content of .*texts.jsonl has changed"):
        train(TrainPlan(**plan))
    shutil.copy(samples / "texts.jsonl", texts)
    plan["stop_after"] = 3
    assert train(TrainPlan(**plan)).step == 3


class Planted:
    """Unpickled plainly, it calls."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def test_resuming_calls_nothing_that_a_checkpoint_names(document, tmp_path: Path) -> None:
    plan = TrainPlan(**document(stop_after=1))
    train(plan)
    metadata = Path(plan.output) / "checkpoints" / "step-00000001" / ".metadata"
    honest = pickle.loads(metadata.read_bytes())
    metadata.write_bytes(pickle.dumps(Planted(tmp_path / "flag")))
    with pytest.raises(TrainingError, match=r"cannot be read: .*\.metadata names posix.system, which no checkpoint"):
        train(TrainPlan(**document()))
    metadata.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(TrainingError, match=r"\.metadata holds dict, expected torch's Metadata"):
        train(TrainPlan(**document()))
    index = next(iter(honest.storage_data))
    honest.storage_data[index] = dataclasses.replace(honest.storage_data[index], relative_path="../../elsewhere")
    metadata.write_bytes(pickle.dumps(honest))
    with pytest.raises(TrainingError, match=r"\.metadata names the file '../../elsewhere', expected one beside it"):
        train(TrainPlan(**document()))
    assert not (tmp_path / "flag").exists()


def test_plain_values_of_a_checkpoint_call_nothing(tmp_path: Path) -> None:
    """They lie in the shards, each pickled by torch."""
    from torch.distributed.checkpoint.state_dict_saver import save

    from sphinxkit.training.resume_state import _Planner, _Reader

    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save({"value": Planted(tmp_path / "flag")}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with (
        pytest.warns(UserWarning, match="torch.distributed is disabled"),
        pytest.raises(CheckpointException, match="Weights only load failed"),
    ):
        load({"value": 0}, storage_reader=_Reader(tmp_path / "saved"), planner=_Planner(), no_dist=True)
    assert not (tmp_path / "flag").exists()


def test_a_run_is_not_overwritten_by_a_fresh_one(document) -> None:
    train(TrainPlan(**document(stop_after=1)))
    with pytest.raises(TrainingError, match="holds a run at step 1: resume it, or name another"):
        train(TrainPlan(**document()), resume=False)


def test_a_damaged_checkpoint_is_an_error(document) -> None:
    plan = TrainPlan(**document(stop_after=1))
    train(plan)
    folder = Path(plan.output) / "checkpoints" / "step-00000001"
    shard = folder / "__0_0.distcp"
    for damage in (lambda: shard.write_bytes(b""), shard.unlink):
        damage()
        with pytest.raises(TrainingError, match=r"the checkpoint .*step-00000001 cannot be read"):
            train(TrainPlan(**document()))
    for text, why in (("{", ""), ('{"plan": {}}', "it holds no model, data, totals"), ("[]", "it holds no plan")):
        (folder / "run.json").write_text(text)
        with pytest.raises(TrainingError, match=rf"run.json cannot be read: .*{why}"):
            train(TrainPlan(**document()))


def test_only_the_newest_checkpoints_are_kept(document) -> None:
    plan = TrainPlan(**document(save_every=1, keep_checkpoints=3))
    train(plan)
    folder = Path(plan.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (6, 7, 8)]


class _Killed(BaseException):
    pass


def test_a_checkpoint_is_whole_or_gone_while_it_is_removed(document, monkeypatch) -> None:
    plan = TrainPlan(**document(save_every=1, keep_checkpoints=1, async_save=False))
    folder = Path(plan.output) / "checkpoints"
    files: list[set[str]] = []

    def kill(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:  # there is nothing of an earlier attempt
            return
        (path / "run.json").unlink()
        files.extend({file.name for file in step.iterdir()} for step in folder.glob("step-*"))
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr("sphinxkit.training.state.shutil.rmtree", kill)
        with pytest.raises(_Killed):
            train(plan)
    assert files == [{"run.json", ".metadata", "__0_0.distcp"}]
    with monkeypatch.context() as patch:

        def refuse(path: Path, **options: Any) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path / "file"))

        patch.setattr("sphinxkit.training.state.shutil.rmtree", refuse)
        with pytest.raises(TrainingError, match=r"-removed.partial cannot be removed: Device or resource busy"):
            train(plan)
    train(plan)
    assert [path.name for path in folder.iterdir()] == ["step-00000008"]
    shutil.copytree(folder / "step-00000008", folder / "step-00000007")  # the kill came just before it was removed
    train(plan)
    assert [path.name for path in folder.iterdir()] == ["step-00000008"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(document, monkeypatch) -> None:
    flushed: list[str] = []

    def flush(path: Path) -> None:
        assert path.exists()
        flushed.append(path.name)

    monkeypatch.setattr("sphinxkit.training.state.flush", flush)
    train(TrainPlan(**document(stop_after=1)))
    assert flushed == ["run.json", ".step-00000001.partial", "checkpoints"]
