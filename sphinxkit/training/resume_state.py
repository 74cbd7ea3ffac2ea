"""Weights and optimiser state in torch's distributed checkpoint format, read without executing code.

torch reads ``.metadata`` and plain values with a full unpickler, which can call any function that a file names. This
module reads ``.metadata`` with an unpickler limited to the names of a checkpoint, and plain values with
``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from sphinxkit.errors import CheckpointError
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.step import LossModule

_METADATA = "torch.distributed.checkpoint.metadata"
# Everything that torch 2.10 to 2.15 write into .metadata, beside dtypes. Source: torch.distributed.checkpoint.
_NAMES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),  # Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _NAMES and not is_dtype:
            raise CheckpointError(
                f".metadata names {module}.{name}, which no checkpoint of a run consists of; nothing was called"
            )
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As the base class, with the restricted unpickler."""
        path = Path(self.path) / ".metadata"
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise CheckpointError(f".metadata holds {type(found).__name__}, expected torch's Metadata")
        for storage in found.storage_data.values():
            name = getattr(storage, "relative_path", None)
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f".metadata names the file {name!r}, expected one beside it")
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As the base class, for plain values only."""
        from torch.distributed.checkpoint._traverse import set_element

        plain = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


@contextmanager
def _without_group_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def model_state(module: LossModule) -> dict[str, Any]:
    """Trained weights of a module, as sharded tensors."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(module, options=StateDictOptions(ignore_frozen_params=True)))


def optimizer_state(module: LossModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser, by parameter name.

    Args:
        module: Owner of the optimised parameters.
        optimizer: Before or after its first step.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return dict(get_optimizer_state_dict(module, optimizer))


def write_state(state: dict[str, Any], folder: Path, dims: ParallelDims) -> None:
    """Write a state dict; every process writes its shards.

    Args:
        state: Nested dicts of tensors and plain values.
        folder: Folder of the files.
        dims: Process layout.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    with _without_group_warning():
        save(
            state,
            storage_writer=FileSystemWriter(folder),
            process_group=dims.checkpoint_group,
            no_dist=dims.mesh is None,
        )


def read_state(folder: Path, module: LossModule, optimizer: torch.optim.Optimizer | None, dims: ParallelDims) -> None:
    """Load weights and optimiser state; the number of processes may differ from that at saving.

    Args:
        folder: Folder of the files.
        module: Changed in place.
        optimizer: Changed in place; None: the weights alone.
        dims: Process layout.
    Raises:
        CheckpointError: A file names a type or function that checkpoints do not use.
        Exception: Various torch errors if a file is damaged or belongs to another model.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {"model": model_state(module)}
    if optimizer is not None:
        state["optimizer"] = optimizer_state(module, optimizer)
    reader = _Reader(folder)
    reader.read_metadata()  # torch 2.10 hides why this fails
    with _without_group_warning():
        load(state, storage_reader=reader, planner=_Planner(), no_dist=dims.mesh is None)
    set_model_state_dict(module, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        set_optimizer_state_dict(module, optimizer, state["optimizer"])
