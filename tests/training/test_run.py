"""The one call of a run: what it takes, when it stops, who may call it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import sphinxkit
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training import TrainingError, TrainPlan, read_log, train
from sphinxkit.training.parallel import count_processes
from sphinxkit.training.run_lock import LOCK_FILE, lock_folder
from sphinxkit.training.trainable_model import find_recipe


def test_a_run_of_a_document_with_overrides(document, recorder) -> None:
    told = recorder()
    found = {"kind": "train", **document()}
    result = sphinxkit.train(found, overrides={"steps": 2, "data.texts.weight": 0.25}, callbacks=[told])
    assert (result.status, result.num_steps) == ("done", 2)
    losses = told.records[0]["losses"]
    assert told.records[0]["loss"] == pytest.approx((losses["captions"] + 0.25 * losses["texts"]) / 1.25)


def test_the_model_is_built_once(document, straight: Path, monkeypatch) -> None:
    built = []

    def construct(self, *args, original=SphinxModel.__init__, **options) -> None:
        built.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(SphinxModel, "__init__", construct)
    train(TrainPlan(**document(steps=1)))
    assert len(built) == 1
    start = {"init_from": str(straight / "model"), "allow_random_encoders": False, "tokenizer": None}
    train(TrainPlan(**document(steps=1, output=str(straight.parent / "once"), **start)))
    assert len(built) == 2


def test_should_stop_pauses_behind_a_step(document, straight: Path) -> None:
    plan = TrainPlan(**document(save_every=None))
    answers = iter([False, False, True])
    result = train(plan, should_stop=lambda: next(answers))
    assert (result.status, result.step, result.signal) == ("paused", 3, None)
    assert train(plan, should_stop=lambda: True).step == 4
    assert train(plan).status == "done"
    losses = [[record["loss"] for record in read_log(folder)] for folder in (Path(plan.output), straight)]
    assert losses[0] == losses[1]


def test_a_callback_that_fails_ends_the_run_and_all_are_told(document, recorder) -> None:
    def fail(record) -> None:
        raise TrainingError("no more")

    told, failing = recorder(), recorder(fail)
    with pytest.raises(TrainingError, match="no more"):
        train(TrainPlan(**document()), callbacks=[failing, told])
    assert told.results == failing.results == [None]
    assert not told.records


# -- one run per folder ------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_told_who_holds_it(document, recorder) -> None:
    plan = TrainPlan(**document(steps=2))

    def second(record) -> None:
        with pytest.raises(
            TrainingError, match=rf"{plan.output} is in use by another training run: process {os.getpid()} on"
        ):
            train(plan)

    assert train(plan, callbacks=[recorder(second)]).status == "done"
    assert [record["step"] for record in read_log(Path(plan.output))] == [0, 1]
    assert train(plan).status == "done"  # the lock is free again


def hold(folder: Path, ready, release) -> None:
    with lock_folder(folder):
        ready.set()
        release.wait(60)


def test_the_lock_holds_between_processes_and_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(TrainingError, match=f"process {holder.pid} on"), lock_folder(tmp_path):
        pass
    holder.kill()
    holder.join()
    with lock_folder(tmp_path):
        pass


def read(ready, release) -> None:
    ready.set()
    release.wait(60)


def test_forked_readers_do_not_keep_the_lock(tmp_path: Path) -> None:
    """Readers of a killed run may live on for seconds; the run can be resumed at once."""
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    with lock_folder(tmp_path):
        reader = context.Process(target=read, args=(ready, release))
        reader.start()
        assert ready.wait(60)
    with lock_folder(tmp_path):
        pass
    release.set()
    reader.join()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="run: cannot be written: Not a directory"),
        lock_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_a_lock_whose_holder_is_not_known(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        (tmp_path / LOCK_FILE).write_text("")
        with pytest.raises(TrainingError, match="it has just started"), lock_folder(tmp_path):
            pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(RuntimeWarning, match="cannot be locked .No locks available.: nothing stops a second run"),
        lock_folder(tmp_path),
    ):
        pass


# -- processes -------------------------------------------------------------------------------------------------------


def test_tasks_of_srun_without_torchrun_are_refused(document, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(
        TrainingError, match=r"Slurm runs 16 tasks .*srun .*torchrun --nnodes 2 --nproc-per-node 8 .*train.sbatch"
    ):
        train(TrainPlan(**document()))
    assert count_processes({"SLURM_NTASKS": "16", "WORLD_SIZE": "1"}) == 1
    assert count_processes({"SLURM_NTASKS": "1"}) == count_processes({}) == 1


def test_the_model_may_be_a_checkpoint(tmp_path: Path) -> None:
    sphinxkit.build("sphinx_micro").save(tmp_path / "tuned")
    assert find_recipe(SimpleNamespace(model="tuned"), tmp_path).document["llm"]["type"] == "llama"
    assert find_recipe(SimpleNamespace(model="nano")).document["conversation"]["coordinate_grid"] == 128
