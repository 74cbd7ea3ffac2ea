"""The name ``nano`` stands for the checkpoint in the package, in every place that takes a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.hub import NANO, is_nano
from sphinxkit.interpolation import MixPlan
from sphinxkit.recipe.weights import beside


@pytest.fixture
def packaged(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkpoint in the place of the one in the package, and another in ``./nano``."""
    model = sphinxkit.load(golden / "llama_ens")
    model.save(tmp_path / "packaged")
    model.llm.norm.weight.data.add_(1)
    model.save(tmp_path / "nano")
    monkeypatch.setattr("sphinxkit.hub._NANO_FOLDER", tmp_path / "packaged")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "packaged"


def norm(folder: Path) -> torch.Tensor:
    return sphinxkit.load(folder).llm.norm.weight


def test_text_is_the_package_and_a_path_is_a_directory(packaged: Path) -> None:
    assert checkpoint.resolve("nano") == packaged
    for place in ("./nano", Path("nano"), str(packaged.parent / "nano"), Path("nano/.")):
        assert not is_nano(place)
        assert checkpoint.resolve(place).resolve() == packaged.parent / "nano"
    assert torch.equal(sphinxkit.load(NANO).llm.norm.weight, norm(packaged))
    assert torch.equal(sphinxkit.load(Path(NANO)).llm.norm.weight, norm(packaged) + 1)


def test_mix_and_its_recipes(packaged: Path, tmp_path: Path) -> None:
    first = norm(packaged)
    for models in (["nano", Path("nano")], ["nano", "./nano"]):
        sphinxkit.mix(models, tmp_path / "mixed", beta=0.75, overwrite=True)
        assert torch.allclose(norm(tmp_path / "mixed"), first + 0.25)
    for where in (".", str(tmp_path)):
        Path("mix.yaml").write_text("kind: mix\nmodels: [nano, ./nano]\nbeta: 0.75\n")
        sphinxkit.mix(Path(where) / "mix.yaml", tmp_path / "mixed", overwrite=True)
        assert torch.allclose(norm(tmp_path / "mixed"), first + 0.25)
    plan = MixPlan(["nano", "./nano"]).relative_to("")
    assert [checkpoint.resolve(model).name for model in plan.models] == ["packaged", "nano"]


@pytest.mark.usefixtures("packaged")
def test_paths_in_recipes_beside_a_folder_of_that_name() -> None:
    assert is_nano(beside(Path(), "nano"))
    assert not is_nano(beside(Path(), "./nano"))
    assert checkpoint.resolve(beside(Path(), "./nano")).resolve() == Path("nano").resolve()


def test_verify_looks_for_its_golden_data(packaged: Path, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"packaged holds no golden data of the public implementation: golden.json"):
        sphinxkit.verify(NANO)
    for name in ("golden.json", "golden.safetensors"):
        shutil.copy(golden / "llama_ens" / name, packaged)
    (tmp_path / "images").symlink_to(golden / "images")
    assert all(result.is_equal for result in sphinxkit.verify(NANO))


@pytest.mark.usefixtures("packaged")
def test_inspect_diff_and_fetch() -> None:
    assert sphinxkit.inspect(NANO).stored is not None
    assert sphinxkit.diff(NANO, Path(NANO)).total.max_abs == pytest.approx(1)
    assert sphinxkit.fetch(NANO) == []


def test_an_unknown_name_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        sphinxkit.load("nanoo")
