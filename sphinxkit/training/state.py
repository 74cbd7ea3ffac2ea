"""Checkpoints of a run: complete folders that any number of processes can resume from, and the exported model.

A checkpoint is written as ``.step-N.partial`` and renamed to ``step-N`` when it is complete, so the newest ``step-N``
is always usable. Tensors are in torch's distributed format (readable by the torch version that wrote it), the rest is
``run.json``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sphinxkit import checkpoint
from sphinxkit.tensor_source import MappingSource
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.lora import merge_lora
from sphinxkit.training.parallel import World
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.step import LossModule

RUN_FILE = "run.json"
_PARTIAL = ".partial"
_SPARE_BYTES = 2**20  # metadata beside the tensors; our choice


def _is_disk_full(error: BaseException | None) -> bool:
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        failures = getattr(current, "failures", None)  # of torch's CheckpointException: rank -> (error, traceback)
        if isinstance(failures, dict):
            pending += [failure[0] for failure in failures.values()]
        pending += [current.__cause__, current.__context__]
    return False


def _reason(error: BaseException) -> str:
    """One line; torch's own error for a failed process holds all of its traceback."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return "; ".join(f"process {rank}: {_reason(failure[0])}" for rank, failure in failures.items())
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _local_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return int(local.nbytes)
    if isinstance(value, Mapping):
        return sum(_local_bytes(nested) for nested in value.values())
    return sum(_local_bytes(nested) for nested in value) if isinstance(value, list | tuple) else 0


def _snapshot(value: Any) -> Any:
    """Copies of everything that lies on the CPU, for writing while training goes on."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value
    if isinstance(value, Mapping):
        return {key: _snapshot(nested) for key, nested in value.items()}
    return [_snapshot(nested) for nested in value] if isinstance(value, list | tuple) else value


class RunStore:
    """The checkpoints of one run.

    Args:
        folder: Holds ``step-N`` folders.
        world: The processes.
        keep: How many of the newest are kept.
    """

    def __init__(self, folder: Path, world: World, keep: int = 2) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self._pending: tuple[int, Future[Any]] | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f".step-*{_PARTIAL}"):
                shutil.rmtree(leftover)
        world.barrier()

    def steps(self) -> list[int]:
        """Steps that can be resumed from, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}{_PARTIAL}"

    def run(self, step: int) -> dict[str, Any]:
        """What ``save`` was given as ``run``.

        Raises:
            TrainingError: The file is damaged.
        """
        path = self.path(step) / RUN_FILE
        try:
            run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read: {error}") from error
        return run

    def save(
        self, step: int, module: LossModule, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Write a checkpoint; a former one that is still being written is finished first.

        Args:
            step: Steps that have been done.
            module: Whose trained weights are saved.
            optimizer: Whose state is saved.
            run: Plain data.
            wait: Return when it is complete; else when it is copied.
        Raises:
            TrainingError: The disk is full or fails; the checkpoints before are intact.
        """
        self.finish()
        state = {"model": _model_state(module), "optimizer": _optimizer_state(module, optimizer)}
        partial = self._partial(step)
        try:
            self._prepare(partial, state, run)
            if wait:
                _write(state, partial, self.world)
                self._commit(step)
            else:
                self._pending = (step, self._write_later(state, partial))
        except (Exception, CheckpointException) as error:
            raise self._failed(step, error) from error

    def _write_later(self, state: dict[str, Any], partial: Path) -> Future[Any]:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        if self.world.device.type == "cpu":
            state = _snapshot(state)
        if self.world.mesh is None:
            executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            future = executor.submit(_write, state, partial, self.world)
            executor.shutdown(wait=False)
            return future
        writer = FileSystemWriter(partial)
        result = async_save(state, storage_writer=writer, process_group=self.world.checkpoint_group)
        return result if isinstance(result, Future) else result.upload_completion

    def _prepare(self, partial: Path, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        needed = sum(self.world.gather(_local_bytes(state)))
        fault: OSError | None = None
        if self.world.is_main:
            try:
                free = shutil.disk_usage(self.folder).free
                if needed + _SPARE_BYTES > free:
                    raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                (partial / RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")
            except OSError as error:
                fault = error
        fault = next((found for found in self.world.gather(fault) if found is not None), None)
        if fault is not None:
            raise fault

    def _commit(self, step: int) -> None:
        self.world.barrier()
        if self.world.is_main:
            target = self.path(step)
            if target.exists():
                shutil.rmtree(target)
            self._partial(step).rename(target)
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        self.world.barrier()

    def _failed(self, step: int, error: BaseException) -> TrainingError:
        if self.world.is_main:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        steps = self.steps()
        before = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is none before it"
        reason = f"the disk is full ({_reason(error)})" if _is_disk_full(error) else _reason(error)
        return TrainingError(f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; {before}")

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            TrainingError: It failed; the checkpoints before are intact.
        """
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
            self._commit(step)
        except (Exception, CheckpointException) as error:
            raise self._failed(step, error) from error

    def poll(self) -> None:
        """Complete the checkpoint that is being written if every process has written its part.

        Raises:
            TrainingError: It failed; the checkpoints before are intact.
        """
        if self._pending is not None and not self.world.any(not self._pending[1].done()):
            self.finish()

    def load(self, step: int, module: LossModule, optimizer: torch.optim.Optimizer) -> None:
        """Fill weights and optimiser from a checkpoint that any number of processes wrote.

        Args:
            step: Which.
            module: Changed in place.
            optimizer: Changed in place.
        Raises:
            TrainingError: It is damaged or of another model.
        """
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )
        from torch.distributed.checkpoint.state_dict_loader import load

        state = {"model": _model_state(module), "optimizer": _optimizer_state(module, optimizer)}
        try:
            with warnings.catch_warnings():  # that there is no process group is meant
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(state, checkpoint_id=self.path(step), no_dist=self.world.mesh is None)
            set_model_state_dict(module, state["model"], options=StateDictOptions(strict=False))
            set_optimizer_state_dict(module, optimizer, state["optimizer"])
        except (Exception, CheckpointException) as error:  # torch raises many kinds for a damaged file
            raise TrainingError(f"the checkpoint {self.path(step)} cannot be read: {_reason(error)}") from error


def _write(state: dict[str, Any], folder: Path, world: World) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():  # that there is no process group is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(
            state,
            storage_writer=FileSystemWriter(folder),
            process_group=world.checkpoint_group,
            no_dist=world.mesh is None,
        )


def _model_state(module: LossModule) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(module, options=StateDictOptions(ignore_frozen_params=True)))


def _optimizer_state(module: LossModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return dict(get_optimizer_state_dict(module, optimizer))


def export(path: Path, module: LossModule, plan: TrainPlan, world: World, dtype: torch.dtype) -> None:
    """Write the whole model as ``sphinxkit.load`` reads it; low-rank updates are merged.

    Args:
        path: Folder; it is replaced.
        module: The trained model.
        plan: Whose low-rank updates they are.
        world: Every process calls; the first one writes.
        dtype: Of the written weights.
    Raises:
        CheckpointError: The disk is full or fails.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True) if world.mesh is not None else None
    tensors: dict[str, Any] = dict(get_model_state_dict(module, options=options))
    fault: Exception | None = None
    if world.is_main:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if plan.lora is not None:
            tensors = merge_lora(tensors, plan.lora)
        model = module.model
        try:
            checkpoint.save(
                path,
                MappingSource(tensors),
                dtype=dtype,
                recipe_yaml=model.recipe_yaml,
                tokenizer=None if model.tokenizer is None else model.tokenizer.to_bytes(),
                overwrite=True,
            )
        except Exception as error:
            fault = error
    fault = next((found for found in world.gather(fault) if found is not None), None)
    if fault is not None:
        raise fault
