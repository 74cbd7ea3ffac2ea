from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import CheckpointError
from sphinxkit.recipe import shipped_folder
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training import TrainPlan, train
from sphinxkit.training.errors import TrainingError


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return sphinxkit.load(folder, accelerate=None).state_dict()


def test_the_last_step_is_the_model_of_the_run(straight: Path, tmp_path: Path) -> None:
    wanted, found = weights(straight / "model"), weights(sphinxkit.export(straight, tmp_path / "model"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_any_step_of_a_run_that_goes_on(document, straight: Path) -> None:
    """As in a run with the frozen encoders and the start's weights elsewhere; the writer's folder stays."""
    plan = document(
        init_from=str(straight / "model"), allow_random_encoders=False, tokenizer=None, save_every=2, stop_after=4
    )
    run = Path(plan["output"])
    train(TrainPlan(**plan))
    partial = run / "checkpoints" / ".step-00000006.partial"
    partial.mkdir()
    done = CliRunner().invoke(app, ["export", str(run), "--step", "2"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(run / "model-step-00000002")
    newest, earlier = weights(sphinxkit.export(run)), weights(run / "model-step-00000002")
    start = weights(straight / "model")
    changed = [name for name in start if not torch.equal(start[name], earlier[name])]
    assert changed
    assert all(not torch.equal(newest[name], earlier[name]) for name in changed if name.endswith("proj.weight"))
    assert not any(".encoders." in name for name in changed)
    assert partial.is_dir()
    with pytest.raises(CheckpointError, match=r"model-step-00000004 exists; pass overwrite=True"):
        sphinxkit.export(run)
    assert sphinxkit.export(run, overwrite=True) == run / "model-step-00000004"
    with pytest.raises(TrainingError, match=r"no checkpoint of step 3; it holds 2, 4"):
        sphinxkit.export(run, step=3)


def test_the_tokenizer_lies_beside_the_model_recipe(document, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    plan = document(steps=1, tokenizer=None)
    pieces = shipped_folder() / "sphinx_micro.model"
    (folder / "pieces.model").write_bytes(pieces.read_bytes())
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plan["model"] | {"tokenizer": "pieces.model"}))
    train(TrainPlan(**(plan | {"model": str(folder / "tiny.yaml")})))
    model = sphinxkit.load(sphinxkit.export(plan["output"]))
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == Tokenizer(pieces).vocab_size


def test_updates_are_merged_and_written_as_an_adapter(document, straight: Path, tmp_path: Path) -> None:
    base = {"init_from": str(straight / "model"), "allow_random_encoders": False, "tokenizer": None, "train": []}
    plan = document(**base, lora={"rank": 2, "targets": ["q_proj"]}, steps=2, export=True)
    train(TrainPlan(**plan))
    folder = sphinxkit.export(plan["output"], tmp_path / "out")
    wanted, found = weights(Path(plan["output"]) / "model"), weights(folder)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    config = json.loads((tmp_path / "out-adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, r"(.*\.)?language_model\..*\.(q_proj)")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no checkpoint; it holds none yet"):
        sphinxkit.export(tmp_path)
