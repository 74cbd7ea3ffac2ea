from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit.errors import CheckpointError

_spec = importlib.util.spec_from_file_location("mixing_models", Path(__file__).parents[1] / "mixing_models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)


def test_extracted_and_added_back(golden: Path, tmp_path: Path) -> None:
    base, tuned = golden / "llama_ens5", models.perturbed(golden / "llama_ens5", tmp_path / "tuned")
    result = sphinxkit.extract_delta(base, tuned, tmp_path / "delta", num_shards=2, verify=True)
    assert (result.path, result.num_shards) == (tmp_path / "delta", 2)
    assert len(list((tmp_path / "delta").glob("*-of-02.model-diff.pth"))) == 2
    assert result.verified is not None
    assert result.verified.total.max_abs < 1e-6  # a rounding of the difference in float32
    first, second, delta = (models.read_all(path) for path in (base, tuned, base))
    delta = models.read_all(tmp_path / "delta", delta=True)
    key = "llm.norm.weight"
    assert torch.equal(delta[key], second[key] - first[key])
    told: list[tuple[str, int, int]] = []
    restored = sphinxkit.apply_delta(
        base, tmp_path / "delta", tmp_path / "out", format="sphinxkit", progress=lambda *facts: told.append(facts)
    )
    assert (restored.num_tensors, restored.num_shards) == (result.num_tensors, None)
    assert torch.equal(models.read_all(tmp_path / "out")[key], first[key] + delta[key])
    assert {total for _, _, total in told} == {sum(size for _, size, _ in told)}
    report = sphinxkit.diff(tuned, tmp_path / "out")
    assert report.total.max_abs == pytest.approx(result.verified.total.max_abs)


def test_the_output_is_no_input(golden: Path, tmp_path: Path) -> None:
    base = golden / "llama_ens5"
    with pytest.raises(CheckpointError, match="is one of the inputs"):
        sphinxkit.extract_delta(base, base, base, overwrite=True)


def test_another_base_is_refused(golden: Path, tmp_path: Path) -> None:
    """The delta knows its base by content, wherever that lies and however it is stored."""
    base, tuned = golden / "llama_ens5", models.perturbed(golden / "llama_ens5", tmp_path / "tuned")
    sphinxkit.extract_delta(base, tuned, tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"tuned: is not the base of the delta .*delta, which was made from"):
        sphinxkit.apply_delta(tuned, tmp_path / "delta", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    sphinxkit.convert(base, tmp_path / "moved")
    sphinxkit.apply_delta(tmp_path / "moved", tmp_path / "delta", tmp_path / "right")
    assert sphinxkit.diff(tuned, tmp_path / "right").total.max_abs < 1e-6
    (tmp_path / "delta" / "provenance.json").unlink()  # as the public implementation's deltas are
    sphinxkit.apply_delta(tuned, tmp_path / "delta", tmp_path / "unknown")
