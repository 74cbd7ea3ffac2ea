"""Manifest of a predictions file: ``NAME.jsonl.manifest.json`` records model, questions and settings.

A run resumes only if its manifest matches.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sphinxkit.atomic import atomic_file
from sphinxkit.errors import DataError
from sphinxkit.evaluation.benchmarks import Benchmark
from sphinxkit.evaluation.inputs import manifest_path
from sphinxkit.evaluation.questions import Question, hash_prompts
from sphinxkit.tensor_files.checksums import file_sha256
from sphinxkit.version import __version__

if TYPE_CHECKING:
    from sphinxkit.formatters import ConversationTemplate

RUN = "run"  # the part of a manifest that may differ when a run resumes


def make_manifest(
    benchmark: Benchmark,
    template: ConversationTemplate,
    questions: Sequence[Question],
    annotations: str | Path,
    model_facts: Mapping[str, Any],
    run_facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a run.

    Args:
        benchmark: The benchmark.
        template: The model's template.
        questions: The questions.
        annotations: The annotations' file.
        model_facts: Facts that identify the model.
        run_facts: Facts that may differ when the run resumes.
    """
    versions = {"sphinxkit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "annotations": {"sha256": file_sha256(Path(annotations)), "count": len(questions)},
        "template": template.name,
        "prompts": {"sha256": hash_prompts(questions), "first": questions[0].prompt},
        "decoding": {
            "method": "greedy",
            "max_new_tokens": benchmark.max_new_tokens,
            "stop": list(template.stop),
        },
        "model": dict(model_facts),
        RUN: {**run_facts, "versions": versions},
    }


def open_manifest(output: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new run, or check that of a resumed run; returns the manifest.

    Args:
        output: The predictions file.
        manifest: This run's manifest.
    Raises:
        DataError: ``output`` has no manifest, a damaged one, or one of another run.
    """
    path = manifest_path(output)
    if not output.exists() or not output.stat().st_size:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return manifest
    if not path.exists():
        raise DataError(
            f"{output} exists, but {path.name} does not: it is unknown what answered it; name another output or "
            "delete it"
        )
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: the manifest cannot be read: {error}") from error
    # as JSON holds it: tuples are lists there
    different = list(_differences(old, json.loads(json.dumps(manifest))))
    if different:
        raise DataError(
            f"{output} was begun by another run: {'; '.join(different)}. Name another output, or delete it and "
            f"{path.name}"
        )
    return dict(old)


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Every leaf in which two manifests differ, as "model.weights was 'a', now 'b'"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            path = f"{name}.{key}" if name else str(key)
            if path != RUN:
                yield from _differences(old.get(key), new.get(key), path)
    elif old != new:
        yield f"{name} was {old!r:.100}, now {new!r:.100}"
