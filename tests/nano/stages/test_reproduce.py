"""The stages in order, with time limits, at micro size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import RecipeError
from sphinxkit.nano.perception.training import PerceptionPlan
from sphinxkit.nano.stages import reproduce as module
from sphinxkit.nano.stages import steps
from sphinxkit.nano.stages.any_size import PICTURES, evaluate_any_size
from sphinxkit.nano.stages.reproduce import STAGES, reproduce_nano
from sphinxkit.nano.stages.scores import ROWS, evaluate_nano
from sphinxkit.nano.stages.steps import TimeLimit
from sphinxkit.training import log, read_log

MIX_ATOL = 1e-6  # float32 sums of two halves


@pytest.fixture
def micro(micro_recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PerceptionPlan(steps=2, batch_size=8, warmup_steps=1, num_workers=0)
    for place in (module, steps):
        monkeypatch.setattr(place, "recipes", lambda: micro_recipes)
    monkeypatch.setattr(module, "PerceptionPlan", lambda: plan)
    few = partial(evaluate_nano, num_scenes=2, rows=ROWS[:1], baselines=False)
    monkeypatch.setattr(module, "evaluate_nano", few)
    one = partial(evaluate_any_size, pictures=PICTURES[:1], rows=ROWS[:1], num_scenes=1)
    monkeypatch.setattr(module, "evaluate_any_size", one)
    monkeypatch.setattr(log, "plot_losses", lambda folder: None)  # a third of the time


def test_stages_stop_when_the_time_is_over(micro: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []

    def report(stage: str, record: Mapping[str, Any]) -> None:
        told.append((stage, record))

    # no time at all: nothing is done
    assert reproduce_nano(tmp_path, minutes=0.0, report=report) == "encoders"
    assert not told
    assert not list(tmp_path.iterdir())
    # until the first stage of training is over
    assert reproduce_nano(tmp_path, last="encoders", report=report) is None
    assert [path.name for path in tmp_path.iterdir()] == ["encoders"]
    # a time limit that is over in the middle of a stage
    answers: Iterator[bool] = iter([False, True])
    monkeypatch.setattr(TimeLimit, "is_over", property(lambda _: next(answers)))
    assert reproduce_nano(tmp_path, minutes=1.0, report=report) == "pretrain_real"
    assert [record["step"] for record in read_log(tmp_path / "pretrain_real")] == [0]
    monkeypatch.undo()


@pytest.mark.slow
def test_resuming_to_the_end(micro: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []
    answers: Iterator[bool] = iter([False] * 5 + [True])
    monkeypatch.setattr(TimeLimit, "is_over", property(lambda _: next(answers, False)))
    # asked before the encoders, behind the first of their two steps, before pre-training, behind its two steps
    following = reproduce_nano(tmp_path, report=lambda *record: told.append(record))
    assert following == "pretrain_synthetic"
    assert reproduce_nano(tmp_path, report=lambda *record: told.append(record)) is None
    assert list(dict.fromkeys(stage for stage, _ in told)) == list(STAGES)
    for name in (
        "pretrain_real",
        "pretrain_synthetic",
        "finetune",
        "finetune_more",
        "finetune_vqa",
        "finetune_subimages",
        "finetune_any_size",
        "finetune_choices",
        "finetune_sizes_and_choices",
        "finetune_hard_choices",
        "finetune_lookups",
        "finetune_letters",
        "finetune_words",
        "finetune_together",
    ):
        assert [record["step"] for record in read_log(tmp_path / name)] == [0, 1]
    # the mix is the mean of both domains
    models = [
        sphinxkit.load(tmp_path / name).state_dict() for name in ("pretrain_real/model", "pretrain_synthetic/model")
    ]
    mixed = sphinxkit.load(tmp_path / "mixed").state_dict()
    for key, tensor in mixed.items():
        assert (tensor - (models[0][key] + models[1][key]) / 2).abs().max() <= MIX_ATOL, key
    # frozen encoders: the same until the last stage, which trains them
    first = sphinxkit.load(tmp_path / "encoders" / "model").state_dict()
    last = sphinxkit.load(tmp_path / "finetune_subimages" / "model")
    assert last.vision is not None
    assert last.vision.image_size == 128
    for key, tensor in last.state_dict().items():
        if ".encoders." in key:
            assert (tensor - first[key]).abs().max() <= 0, key
    # all is there: nothing runs again, whatever the time; the command prints the table
    before = len(told)
    assert reproduce_nano(tmp_path, minutes=0.0, report=lambda *record: told.append(record)) is None
    assert len(told) == before
    result = CliRunner().invoke(app, ["reproduce", "nano", "--output", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith("| task | goal | SPHINX-nano |")
    assert ROWS[0].name in result.stdout
    scored = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scored["rows"][ROWS[0].name]["task"] == ROWS[0].task


def test_the_command_says_where_it_stopped(micro: None, tmp_path: Path) -> None:
    arguments = ["reproduce", "nano", "--output", str(tmp_path), "--minutes", "0"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "stopped; the next call resumes with encoders\n"


def test_the_command_says_how_long_a_stage_takes(micro: None, tmp_path: Path) -> None:
    arguments = ["reproduce", "nano", "--output", str(tmp_path), "--last", "encoders"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert re.search(r'^encoders: \{"step": 2, .*"num_steps": 2\}  0:00:00 left$', result.stderr, re.MULTILINE)


def test_a_stage_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no stage 'finetun'; did you mean 'finetune'.*Stages: encoders, "):
        reproduce_nano(tmp_path, last="finetun")


def test_a_time_limit() -> None:
    assert not TimeLimit().is_over
    assert TimeLimit(0.0, began=0.0).is_over
    assert not TimeLimit(60.0).is_over
