"""Checkpoints of a run: complete folders that any number of processes can resume from.

A checkpoint is written as ``.step-N.partial`` and renamed to ``step-N`` when it is complete, and renamed again before
it is removed, so every ``step-N`` is always usable. Tensors are in torch's distributed format (readable by the torch
version that wrote it), the rest is ``run.json``.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sphinxkit.atomic import flush
from sphinxkit.training.errors import TrainingError, named_errors
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.resume_state import model_state, optimizer_state, read_state, write_state
from sphinxkit.training.step import LossModule

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run's."""

RUN_FILE = "run.json"
_RUN_KEYS = ("plan", "model", "data", "totals")
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
    """Copies of all CPU tensors, for writing during training."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value
    if isinstance(value, Mapping):
        return {key: _snapshot(nested) for key, nested in value.items()}
    return [_snapshot(nested) for nested in value] if isinstance(value, list | tuple) else value


def saved_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match.group(1)) for match in found if match)


def step_folder(folder: Path, step: int) -> Path:
    """Folder of a step's checkpoint.

    Args:
        folder: Of the checkpoints.
        step: Number of finished steps.
    """
    return folder / f"step-{step:08d}"


def read_run(path: Path) -> dict[str, Any]:
    """What lies beside the tensors of a checkpoint: plan, model, data, totals.

    Raises:
        TrainingError: The file is damaged.
    """
    path = path / RUN_FILE
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    lacking = [key for key in _RUN_KEYS if not isinstance(run, dict) or not isinstance(run.get(key), dict)]
    if lacking:
        raise TrainingError(f"{path} cannot be read: it holds no {', '.join(lacking)}")
    return run


def load_weights(
    path: Path, module: LossModule, dims: ParallelDims, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Load a checkpoint; the number of processes may differ from that at saving.

    Args:
        path: Folder of the checkpoint.
        module: Its weights are changed in place.
        dims: Process layout.
        optimizer: Changed in place; None: the weights alone.
    Raises:
        TrainingError: The checkpoint is damaged or belongs to another model.
    """
    try:
        read_state(path, module, optimizer, dims)
    except (Exception, CheckpointException) as error:  # torch raises many kinds for a damaged file
        raise TrainingError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error


class RunStore:
    """The checkpoints of one run.

    Args:
        folder: Folder of the ``step-N`` folders.
        dims: Process layout.
        keep_checkpoints: Number of newest checkpoints to keep.
        on_complete: Called in the first process with the step and folder of every complete checkpoint.
    Raises:
        TrainingError: What a killed run left cannot be removed.
    """

    def __init__(
        self,
        folder: Path,
        dims: ParallelDims,
        keep_checkpoints: int = 2,
        on_complete: Callable[[int, Path], None] | None = None,
    ) -> None:
        self.folder, self.dims, self.keep_checkpoints = folder, dims, keep_checkpoints
        self.on_complete = on_complete
        self._pending: tuple[int, Future[Any]] | None = None
        with dims.shared_errors():
            for leftover in folder.glob(f".step-*{_PARTIAL}") if dims.is_main else ():
                with named_errors(leftover, "removed"):
                    shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return saved_steps(self.folder)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return step_folder(self.folder, step)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}{_PARTIAL}"

    def run(self, step: int) -> dict[str, Any]:
        """The ``run`` data given to ``save``.

        Raises:
            TrainingError: The file is damaged.
        """
        return read_run(self.path(step))

    def save(
        self, step: int, module: LossModule, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Write a checkpoint; a pending asynchronous one is finished first.

        Args:
            step: Number of finished steps.
            module: Module with the trained weights.
            optimizer: The optimiser.
            run: Plain data.
            wait: Return when the checkpoint is complete; False: when its data are copied.
        Raises:
            TrainingError: The disk is full or fails; earlier checkpoints are intact.
        """
        self.finish()
        state = {"model": model_state(module), "optimizer": optimizer_state(module, optimizer)}
        partial = self._partial(step)
        try:
            self._prepare(partial, state, run)
            if wait:
                write_state(state, partial, self.dims)
                self._commit(step)
            else:
                self._pending = (step, self._write_later(state, partial))
        except (Exception, CheckpointException) as error:
            raise self._failed(step, error) from error
        if wait:
            self._tell(step)

    def _write_later(self, state: dict[str, Any], partial: Path) -> Future[Any]:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        if self.dims.device.type == "cpu":
            state = _snapshot(state)
        if self.dims.mesh is None:
            executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            future = executor.submit(write_state, state, partial, self.dims)
            executor.shutdown(wait=False)
            return future
        writer = FileSystemWriter(partial)
        result = async_save(state, storage_writer=writer, process_group=self.dims.checkpoint_group)
        return result if isinstance(result, Future) else result.upload_completion

    def _prepare(self, partial: Path, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        needed = sum(self.dims.gather(_local_bytes(state)))
        with self.dims.shared_errors():
            if not self.dims.is_main:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if needed + _SPARE_BYTES > free:
                raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / RUN_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")

    def _commit(self, step: int) -> None:
        self.dims.barrier()
        with self.dims.shared_errors():
            if not self.dims.is_main:
                return
            partial, target = self._partial(step), self.path(step)
            flush(partial / RUN_FILE)  # torch flushes its own
            flush(partial)
            if target.exists():
                self._remove(step)
            partial.rename(target)
            flush(self.folder)
            self._remove_old()

    def _remove_old(self) -> None:
        for old in self.steps()[: -self.keep_checkpoints]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        """Remove a checkpoint; a kill in between leaves no half one under its name."""
        removed = self.folder / f".step-{step:08d}-removed{_PARTIAL}"
        self.path(step).rename(removed)
        shutil.rmtree(removed)

    def _tell(self, step: int) -> None:
        if self.on_complete is not None and self.dims.is_main:
            self.on_complete(step, self.path(step))

    def _failed(self, step: int, error: BaseException) -> TrainingError:
        if self.dims.is_main:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        steps = self.steps()
        before = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is none before it"
        reason = f"the disk is full ({_reason(error)})" if _is_disk_full(error) else _reason(error)
        return TrainingError(f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; {before}")

    def finish(self) -> None:
        """Wait for the pending checkpoint.

        Raises:
            TrainingError: Writing failed; earlier checkpoints are intact.
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
        self._tell(step)

    def poll(self) -> None:
        """Complete the pending checkpoint if every process has written its part.

        Raises:
            TrainingError: Writing failed; earlier checkpoints are intact.
        """
        if self._pending is not None and not self.dims.any(not self._pending[1].done()):
            self.finish()

    def load(self, step: int, module: LossModule, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and optimiser state; the number of processes may differ from that at saving.

        Older checkpoints that a killed run had still to remove are removed.

        Args:
            step: Step of the newest checkpoint.
            module: Changed in place.
            optimizer: Changed in place.
        Raises:
            TrainingError: The checkpoint is damaged or belongs to another model, or an older one cannot be removed.
        """
        load_weights(self.path(step), module, self.dims, optimizer)
        with self.dims.shared_errors(), named_errors(self.folder):
            if self.dims.is_main:
                self._remove_old()
