"""Loads a checkpoint into a module, tensor by tensor, directly to its device and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import bitwise_equal
from sphinxkit.errors import raise_errors
from sphinxkit.registry import suggest
from sphinxkit.tensor_files.lazy import LazySource
from sphinxkit.tensor_source import TensorSource


@dataclass(frozen=True)
class LoadReport:
    """Result of :func:`load_into`.

    Attributes:
        loaded: Names that were filled.
        missing: Names of the module that the source does not hold (only with ``strict=False``).
        unexpected: Names of the source that the module does not have (only with ``strict=False``).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class _Slot:
    """A parameter or persistent buffer and every name it goes by."""

    tensor: Tensor
    names: tuple[str, ...]


def _slots(module: nn.Module) -> list[_Slot]:
    """What a state dict of the module would hold, tied names together, in its order."""
    by_identity: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):  # a module's extra state, which no checkpoint here holds
            continue
        by_identity.setdefault(id(tensor), (tensor, []))[1].append(name)
    return [_Slot(tensor, tuple(names)) for tensor, names in by_identity.values()]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _with_file_name(source: TensorSource, key: str) -> str:
    """The name of a tensor, and the one it has in the files where that is another."""
    theirs = source.name_in_files(key) if isinstance(source, Checkpoint) else key
    return repr(key) if theirs == key else f"{key!r} ({theirs!r} in the files)"


def _errors(slots: Iterable[_Slot], source: TensorSource, strict: bool) -> tuple[list[str], list[str], list[str]]:
    """Errors; missing names; unexpected names."""
    available = list(source.keys())
    held = set(available)
    expected = {name for slot in slots for name in slot.names}
    missing = [slot.names[0] for slot in slots if not held.intersection(slot.names)]
    unexpected = [key for key in available if key not in expected]
    errors = list(source.errors) if isinstance(source, Checkpoint) else []
    known = {error.split(" ", 1)[0] for error in errors}  # the reader's words on a tensor that does not fit
    for slot in slots:
        for name in slot.names:
            if name not in held:
                continue
            if source.shape(name) != tuple(slot.tensor.shape) and name not in known:
                shapes = f"{list(source.shape(name))} in the checkpoint, {list(slot.tensor.shape)} in the model"
                errors.append(f"{_with_file_name(source, name)} is {shapes}")
            stored, own = source.dtype(name), slot.tensor.dtype
            if stored.is_floating_point != own.is_floating_point:
                errors.append(f"{_with_file_name(source, name)} is {stored} in the checkpoint, {own} in the model")
    for slot in slots:
        present = [name for name in slot.names if name in held]
        if len(present) > 1 and len({source.shape(name) for name in present}) == 1:
            first = source.read(present[0])
            errors += [
                f"{name!r} is tied to {present[0]!r} in the model but differs from it in the checkpoint"
                for name in present[1:]
                if not bitwise_equal(first, source.read(name))
            ]
    if strict:
        errors += [
            f"{_with_file_name(source, name)} is missing in the checkpoint{suggest(name, unexpected)}"
            for name in missing
        ]
        errors += [f"{key!r} is in the checkpoint but not in the model{suggest(key, missing)}" for key in unexpected]
    return errors, missing, unexpected


def _forgotten_buffers(module: nn.Module) -> tuple[list[nn.Module], list[str]]:
    """Modules that can remake their non-persistent meta buffers, and names of buffers that nobody can remake."""
    remakers: list[nn.Module] = []
    lost: list[str] = []
    for path, part in module.named_modules():
        names = [
            name
            for name, buffer in part.named_buffers(recurse=False)
            if buffer.is_meta and name in part._non_persistent_buffers_set
        ]
        if not names:
            continue
        if callable(getattr(part, "init_non_persistent_buffers", None)):
            remakers.append(part)
        else:
            lost += [f"{path}.{name}".lstrip(".") for name in names]
    return remakers, lost


def _fill(
    source: TensorSource, key: str, like: Tensor, device: torch.device | None, dtype: torch.dtype | None
) -> Tensor:
    stored = source.dtype(key)
    target_dtype = dtype if dtype is not None and stored.is_floating_point else stored
    out = torch.empty(tuple(like.shape), device=device, dtype=target_dtype)
    if isinstance(source, LazySource):
        source.read_into(key, out)
    else:
        out.copy_(source.read(key))
    return out


def load_into(
    module: nn.Module,
    source: TensorSource,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> LoadReport:
    """Fill a module's parameters and persistent buffers, one tensor at a time.

    The module is best built on the meta device: each parameter is then made where it belongs and filled from mapped
    files, so that the peak is the weights plus about one tensor. Everything is checked before anything is touched.
    ``requires_grad`` and ties between parameters stay as they were. Buffers that are not saved (and were built on
    meta) are remade by their module's ``init_non_persistent_buffers``, timm's name for it, or reported.

    Args:
        module: On meta or not; parameters are replaced.
        source: Tensors under the module's own names.
        device: Where the weights go; None: the CPU for what is on meta, else where the parameter is.
        dtype: Dtype of all floating-point tensors; None keeps each one's stored dtype.
        strict: Whether names that only one side has are errors. Without it, missing parameters stay as they are,
            on meta too. Wrong shapes are always errors.
    Returns:
        What was loaded, and what was not.
    Raises:
        CheckpointError: One error with every name that is missing, unexpected, mis-shaped, tied but different, or
            a buffer that cannot be remade; or a replica that differs between shards.
    """
    slots = _slots(module)
    errors, missing, unexpected = _errors(slots, source, strict)
    remakers, lost = _forgotten_buffers(module)
    errors += [
        f"buffer {name!r} is not saved in checkpoints and was built on the meta device: build its module on a real "
        "device, or give it an init_non_persistent_buffers method"
        for name in lost
    ]
    raise_errors("the checkpoint does not fit the model (is it the right recipe?)", errors)
    held = set(source.keys())
    loaded: list[str] = []
    chosen = None if device is None else torch.device(device)
    with torch.no_grad():
        for slot in slots:
            key = next((name for name in slot.names if name in held), None)
            if key is None:
                continue
            old = slot.tensor
            place = chosen or (torch.device("cpu") if old.is_meta else old.device)
            filled = _fill(source, key, old, place, dtype)
            if isinstance(old, nn.Parameter):
                filled = nn.Parameter(filled, requires_grad=old.requires_grad)
            for name in slot.names:
                owner, leaf = _owner(module, name)
                setattr(owner, leaf, filled)
            loaded.append(key)
        for part in remakers:
            _remake(part, chosen or torch.device("cpu"))
    return LoadReport(tuple(loaded), tuple(missing), tuple(unexpected))


def _remake(part: nn.Module, device: torch.device) -> None:
    for name in list(part._non_persistent_buffers_set):
        buffer = part._buffers.get(name)
        if buffer is not None and buffer.is_meta:
            part._buffers[name] = torch.empty_like(buffer, device=device)
    remake: Any = part.init_non_persistent_buffers
    remake()
