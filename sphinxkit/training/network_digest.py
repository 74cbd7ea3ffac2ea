"""A hash of everything that determines a network's output."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.version import __version__


def tensor_digest(tensor: Tensor) -> bytes:
    """16 bytes that differ where shape, dtype or values differ.

    Shape:
        tensor: any
    """
    total = hashlib.blake2b(repr((tuple(tensor.shape), tensor.dtype)).encode(), digest_size=16)
    total.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return total.digest()


def _describe(value: Any) -> str:
    """A setting of a module in words that are the same in every process; values that are no settings by their type."""
    if isinstance(value, str | bytes | int | float | bool | torch.dtype | torch.Size | None):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_describe(key)}: {_describe(nested)}' for key, nested in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_describe(nested) for nested in value]
        return f"[{', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)}]"
    if isinstance(value, partial):
        return f"partial({_describe(value.func)}, {_describe(value.args)}, {_describe(value.keywords)})"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}({_describe({f.name: getattr(value, f.name) for f in fields(value)})})"
    if isinstance(value, types.MethodType):
        return _describe(value.__func__)
    if isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{_describe([value.__defaults__, value.__kwdefaults__, inside])}"
    kind = value if isinstance(value, type | types.BuiltinFunctionType) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def network_digest(module: nn.Module) -> str:
    """Hash everything that determines a network's output: weights, buffers, layer types and settings.

    Args:
        module: In eval mode.
    """
    total = hashlib.blake2b(__version__.encode(), digest_size=16)
    for name, layer in module.named_modules():
        settings = {key: value for key, value in vars(layer).items() if not _is_machinery(key)}
        total.update(f"{name}: {type(layer).__module__}.{type(layer).__qualname__} {_describe(settings)}\n".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        total.update(f"{name}: {tensor_digest(tensor).hex()}\n".encode())
    return total.hexdigest()


def _is_machinery(key: str) -> bool:
    """What ``nn.Module`` keeps for itself; parameters, buffers and layers below are walked."""
    return key in _MACHINERY or key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


_MACHINERY = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "forward"})
