"""Provenance of a mixed checkpoint: ``provenance.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint import Checkpoint
from sphinxkit.errors import CheckpointError
from sphinxkit.interpolation import MixedSource, MixPlan
from sphinxkit.tensor_files.files import read_json
from sphinxkit.version import __version__

PROVENANCE = "provenance.json"


def file_facts(model: Checkpoint, path: Path) -> dict[str, Any]:
    """Name and size of a checkpoint's file, and its SHA-256 where the checkpoint's own index records it."""
    recorded = model.metadata.get("files")
    facts = recorded.get(path.name, {}) if isinstance(recorded, Mapping) else {}
    found = {"name": path.name, "size": path.stat().st_size}
    return {**found, "sha256": facts["sha256"]} if facts.get("sha256") else found


def has_sums(model: Checkpoint) -> bool:
    """Whether a checkpoint's own index records the SHA-256 of every file."""
    return all("sha256" in file_facts(model, path) for path in model.files)


class LateText(Mapping[str, str]):
    """The provenance file, whose text is made when everything else has been written and hashed.

    Args:
        text: Makes it; what it raises stops the writing, and nothing is left behind.
        others: Further files beside it.
    """

    def __init__(self, text: Callable[[], str], others: Mapping[str, str] | None = None) -> None:
        self._text = text
        self._others = dict(others or {})

    def __getitem__(self, name: str) -> str:
        return self._text() if name == PROVENANCE else self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter([PROVENANCE, *self._others])

    def __len__(self) -> int:
        return 1 + len(self._others)


def delta_provenance(base: Checkpoint, delta: MixedSource) -> str:
    """What a delta says of its base: where it lay, and its content's hash.

    Args:
        base: Opened.
        delta: From ``delta_source`` with ``hash_inputs``, written.
    """
    content = delta.input_hashes()[1]
    said = {"path": str(base.path), "tensors": content.tensors, "sha256": content.sha256}
    return json.dumps({"made_by": f"sphinxkit {__version__} delta", "base": said}, indent=1) + "\n"


def delta_base(delta: Checkpoint) -> dict[str, Any] | None:
    """What a delta's folder says of its base; None where it says nothing, as with the public implementation's.

    Args:
        delta: Opened.
    Raises:
        CheckpointError: The file is damaged.
    """
    path = delta.path / PROVENANCE
    said = read_json(path).get("base") if path.is_file() else None
    return said if isinstance(said, dict) and isinstance(said.get("sha256"), str) else None


def restored_provenance(base: Checkpoint, delta: Checkpoint, restored: MixedSource) -> str:
    """What a model says that was made of a base and a delta.

    Args:
        base: Opened.
        delta: The same.
        restored: From ``restored_source`` with ``hash_inputs``, written.
    Raises:
        CheckpointError: The delta was made from another base.
    """
    content, said = restored.input_hashes()[0], delta_base(delta)
    if said is not None and said["sha256"] != content.sha256:
        raise CheckpointError(
            f"{base.path}: is not the base of the delta {delta.path}, which was made from {said.get('path')}: their "
            f"contents differ (SHA-256 {str(content.sha256)[:12]}... against {said['sha256'][:12]}...); nothing was "
            "written"
        )
    made = {"base": {"path": str(base.path), "sha256": content.sha256}, "delta": {"path": str(delta.path)}}
    return json.dumps({"made_by": f"sphinxkit {__version__} delta", **made}, indent=1) + "\n"


def provenance(
    plan: MixPlan, models: Sequence[Checkpoint], base: Checkpoint | None, mixed: MixedSource, weights: Sequence[float]
) -> dict[str, Any]:
    """Version, method, weights, rules, and of each input its path, format, files and content.

    Args:
        plan: The mix plan.
        models: The opened models.
        base: Their common ancestor, opened, or None.
        mixed: Their mix, written.
        weights: One per model.
    """
    hashes = mixed.input_hashes()
    inputs = []
    for index, model in enumerate([*models, *([base] if base else [])]):
        content = hashes[index] if hashes and hashes[index].tensors else None
        inputs.append(
            {
                "path": str(model.path),
                "role": "base" if model is base else "model",
                "weight": None if model is base else weights[index],
                "format": model.format,
                "files": [file_facts(model, path) for path in model.files],
                "content": {"tensors": content.tensors, "sha256": content.sha256} if content else None,
            }
        )
    kinds = [outcome.kind for outcome in mixed.outcomes.values()]
    return {
        "made_by": f"sphinxkit {__version__} mix",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": plan.method,
        "weights": list(weights),
        "beta": weights[0] if len(weights) == 2 else None,
        "rules": plan.rules,
        "rename": plan.rename,
        "overlays": plan.overlays,
        "dtype": plan.dtype,
        "llm_only": plan.llm_only,
        "inputs": inputs,
        "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }
