"""Provenance of a mixed checkpoint: ``provenance.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint import Checkpoint
from sphinxkit.interpolation import MixedSource, MixPlan
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
        "dtype": plan.dtype,
        "llm_only": plan.llm_only,
        "inputs": inputs,
        "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }
