"""Keys of a training recipe: former names, and keys that may change on resume."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

RENAMED_KEYS: Mapping[str, str] = {
    "clip": "max_grad_norm",
    "fsdp": "dp_shard",
    "init": "init_from",
    "keep": "keep_checkpoints",
    "warmup": "warmup_ratio",
    "workers": "num_workers",
}
"""Old name of a key -> its name now. A recipe with an old name is an error; a saved run is translated."""

RENAMED_PARTS: Mapping[str, str] = {"tags": "image_delimiters"}
"""Old name of a part in ``train`` and ``lr_scale`` -> its name now."""

RENAMED_MODULES: Mapping[str, str] = {"sphinxkit.data.procedural": "sphinxkit.nano.world"}
"""Old module of a builder, as a mixture's ``type: module:name`` has it -> its module now; nothing imports either."""

FREE_KEYS = frozenset(
    {
        *("output", "data_root", "device", "dp_replicate", "dp_shard", "tensor_parallel"),
        *("activation_checkpointing", "compile", "encoder_cache", "num_workers", "pack_tokens", "packing"),
        *("micro_batch_size", "save_every", "keep_checkpoints", "async_save", "stop_after", "log_every"),
        *("tensorboard", "wandb", "profile", "evaluate_every", "evaluate", "export", "peak_flops", "on_nonfinite"),
    }
)
"""Keys that may differ between save and resume: they change where and how fast a run computes, not what."""


def translate_saved(document: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the plan of a saved run to the current key names.

    Args:
        document: Plan beside a checkpoint, possibly with former key names.
    """
    found = {RENAMED_KEYS.get(key, key): value for key, value in document.items()}
    if isinstance(found.get("train"), list):
        found["train"] = [RENAMED_PARTS.get(part, part) for part in found["train"]]
    if isinstance(found.get("lr_scale"), Mapping):
        found["lr_scale"] = {RENAMED_PARTS.get(part, part): scale for part, scale in found["lr_scale"].items()}
    if isinstance(found.get("data"), Mapping):
        found["data"] = {name: _translate_stream(stream) for name, stream in found["data"].items()}
    return found


def _translate_stream(stream: Any) -> Any:
    mixture = stream.get("mixture") if isinstance(stream, Mapping) else None
    if not isinstance(mixture, Mapping) or not isinstance(mixture.get("type"), str):
        return stream
    module, colon, name = mixture["type"].partition(":")
    return {**stream, "mixture": {**mixture, "type": f"{RENAMED_MODULES.get(module, module)}{colon}{name}"}}


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Differences between the plan of a saved run and the plan that resumes it, as ``key: old -> new``.

    ``FREE_KEYS`` are ignored.

    Args:
        saved: Plan beside the checkpoint.
        current: Current plan.
        prefix: Prefix of the keys in nested mappings.
    """
    lines = []
    for key in sorted(set(saved) | set(current), key=str):
        if not prefix and key in FREE_KEYS:
            continue
        old, new = saved.get(key, "(absent)"), current.get(key, "(absent)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new and not (prefix and key not in saved and new is None):  # saved before there was this key
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines


def part_errors(key: str, parts: Collection[str], known: Iterable[str]) -> list[str]:
    """One message for each part that does not exist.

    Args:
        key: Key that lists the parts.
        parts: Their names.
        known: Valid names.
    """
    from sphinxkit.registry import suggest

    errors = []
    for part in parts:
        if part in RENAMED_PARTS:
            errors.append(f"{key}: {part!r} is now called {RENAMED_PARTS[part]!r}")
        elif part not in known:
            errors.append(f"{key}: expected parts of {', '.join(known)}, got {part!r}{suggest(part, known, parts)}")
    return errors
