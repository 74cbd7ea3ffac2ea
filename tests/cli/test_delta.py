from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sphinxkit import checkpoint
from sphinxkit.cli import app
from sphinxkit.errors import CheckpointError

_spec = importlib.util.spec_from_file_location("mixing_models", Path(__file__).parents[1] / "mixing_models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

RESTORED = 2e-6  # base + (tuned - base) in float32, on values of a few units


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def pair(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return golden / "llama_ens5", models.perturbed(golden / "llama_ens5", folder / "tuned", num_shards=4)


def test_extract_and_apply(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    told = json.loads(run("delta", "extract", base, tuned, "-o", tmp_path / "delta", "--verify", "--json"))
    assert told["shards"] == 4
    assert told["verified"]["max_abs"] < RESTORED
    names = sorted(path.name for path in (tmp_path / "delta").glob("*.pth"))
    assert names == [f"consolidated.{rank:02d}-of-04.model-diff.pth" for rank in range(4)]
    stored = torch.load(tmp_path / "delta" / names[0], weights_only=True)
    start = "llma.start_img"
    expected = models.read_all(tuned)["vision.start_token"] - models.read_all(base)["vision.start_token"]
    assert torch.equal(stored["model"][start].reshape(-1), expected.reshape(-1))  # the public implementation's names
    run("delta", "apply", base, tmp_path / "delta", "-o", tmp_path / "restored", "--shards", 1)
    a, b = models.read_all(tuned), models.read_all(tmp_path / "restored")
    assert set(a) == set(b)
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, atol=RESTORED, rtol=0)
    with checkpoint.open(tmp_path / "restored") as opened:
        assert opened.metadata["num_shards"] == 1
    assert "tensors are equal" in run("delta", "extract", base, tuned, "-o", tmp_path / "again", "--verify")


def test_files_of_the_public_implementation(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A hand-made delta in half precision that knows two tensors only."""
    delta = tmp_path / "delta"
    delta.mkdir()
    tensors = {"llma.norm.weight": torch.full((64,), 0.5, dtype=torch.float16)}
    torch.save({"model": tensors}, delta / "consolidated.00-of-01.model-diff.pth")
    run("delta", "apply", pair[0], delta, "-o", tmp_path / "out", "--json")
    base, out = models.read_all(pair[0]), models.read_all(tmp_path / "out")
    assert torch.equal(out.pop("llm.norm.weight"), base.pop("llm.norm.weight") + 0.5)
    assert all(torch.equal(tensor, base[key]) for key, tensor in out.items())


def test_vision_on_a_language_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Base a Meta LLaMA in one shard, tuned a whole SPHINX in four: what only the tuned one has is stored whole."""
    base, tuned = pair
    with checkpoint.open(base) as opened:
        checkpoint.save(tmp_path / "llama", opened, format="meta", part="llm")
    run("delta", "extract", tmp_path / "llama", tuned, "-o", tmp_path / "delta", "--dtype", "float32")
    run("delta", "apply", tmp_path / "llama", tmp_path / "delta", "-o", tmp_path / "out", "--to", "sphinxkit")
    a, b = models.read_all(tuned), models.read_all(tmp_path / "out")
    assert set(a) == set(b)
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, atol=RESTORED, rtol=0)


def test_bad_input(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    for arguments, message in (
        (("extract", base, tuned, "-o", base, "--overwrite"), "is one of the inputs"),
        (("apply", base, tuned, "-o", tmp_path / "out"), "no consolidated.NN-of-MM.model-diff.pth"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CliRunner().invoke(app, ["delta", *map(str, arguments)], catch_exceptions=False)
    run("delta", "extract", base, tuned, "-o", tmp_path / "delta")
    with pytest.raises(CheckpointError, match="unknown checkpoint format 'gguf'; known: hf"):
        CliRunner().invoke(
            app,
            ["delta", "apply", str(base), str(tmp_path / "delta"), "-o", str(tmp_path / "out"), "--to", "gguf"],
            catch_exceptions=False,
        )
    assert not (tmp_path / "out").exists()
