"""Scoring: what is right scores 1, what is blind is shown nothing, and a stopped call is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinxkit.batch_inference import Answer, Request
from sphinxkit.evaluation import predictions
from sphinxkit.formatters import create as create_template
from sphinxkit.generation import Generation
from sphinxkit.nano.stages import scores
from sphinxkit.nano.stages.scores import ROWS, evaluate_nano, majority_answer, table
from sphinxkit.nano.world import World, render
from sphinxkit.recipe import shipped_folder
from sphinxkit.tilers.images import load_image
from sphinxkit.tokenizer import Tokenizer

SIZE = 64
NUM_SCENES = 4


class _Vision:
    image_size = SIZE


class Oracle:
    """Knows the answer to every question about a picture of the held-out world, and says nothing without one."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(shipped_folder() / "nano" / "tokenizer.model")
        self.vision = _Vision()
        self.conversation = create_template("sphinx_v1")
        self.recipe_yaml = "kind: model"
        self.dtype = torch.float32
        self.answers: dict[tuple[bytes, str], str] = {}
        self.asked: list[tuple[str, bool]] = []
        self.lengths: set[int] = set()
        world = World("synthetic", "test", SIZE, scores.SEED)
        for row in ROWS:
            for index in range(NUM_SCENES):
                scene, (question, answer) = world.conversation(index, row.task)
                self.answers[render(scene).tobytes(), question["content"]] = answer["content"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"one": torch.ones(3)}

    def answer(self, request: Request) -> str:
        self.lengths.add(request.sampling.max_new_tokens)
        self.asked.append((request.prompt, request.image is not None))
        pixels = b"" if request.image is None else load_image(request.image).tobytes()
        right = [text for (shown, asked), text in self.answers.items() if shown == pixels and asked in request.prompt]
        return right[0] if right else ""


def answer_requests(model: Oracle, requests: Iterable[Request], *, batch_size: int) -> Iterator[Answer]:
    for request in requests:
        yield Answer(request, Generation(model.answer(request), [], "stop"))


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    model = Oracle()
    monkeypatch.setattr(scores, "load", lambda path: model)
    monkeypatch.setattr(predictions, "answer_requests", answer_requests)
    monkeypatch.setattr(scores, "NUM_COUNTED", 30)
    return model


def test_right_answers_score_one_and_blind_ones_none(oracle: Oracle, tmp_path: Path) -> None:
    told: list[Any] = []
    assert evaluate_nano("model", tmp_path, num_scenes=NUM_SCENES, report=told.append)
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["num_scenes"] == NUM_SCENES
    assert found["world"] == f"synthetic-test-64x64-{scores.SEED}"
    assert list(found["rows"]) == [row.name for row in ROWS] == [record["row"] for record in told]
    for row in ROWS:
        scored = found["rows"][row.name]
        assert scored["model"] == 1.0, row
        assert scored["unparsable"] == 0
        assert scored["blind"] == 0.0, row
        assert 0.0 <= scored["majority"] < 1.0, row
        assert scored["scores"][row.score] == 1.0
    # half of the questions came without a picture: the blind model's
    assert len(oracle.asked) == 2 * NUM_SCENES * len(ROWS)
    assert sum(has_image for _, has_image in oracle.asked) == NUM_SCENES * len(ROWS)
    assert oracle.lengths == {row.max_new_tokens for row in ROWS}
    # again: nothing is asked
    before = len(oracle.asked)
    assert evaluate_nano("model", tmp_path, num_scenes=NUM_SCENES)
    assert len(oracle.asked) == before


def test_a_stopped_call_is_gone_on_with(oracle: Oracle, tmp_path: Path) -> None:
    rows = ROWS[:2]
    asked = iter([False, False, True])
    assert not evaluate_nano("m", tmp_path, rows=rows, num_scenes=NUM_SCENES, should_stop=lambda: next(asked))
    assert not (tmp_path / "scores.json").exists()
    assert len(oracle.asked) == 2 * NUM_SCENES
    assert evaluate_nano("m", tmp_path, rows=rows, num_scenes=NUM_SCENES)
    assert len(oracle.asked) == 4 * NUM_SCENES
    assert set(json.loads((tmp_path / "scores.json").read_text())["rows"]) == {row.name for row in rows}


def test_without_baselines(oracle: Oracle, tmp_path: Path) -> None:
    assert evaluate_nano("m", tmp_path, rows=ROWS[2:3], num_scenes=2, baselines=False)
    (row,) = json.loads((tmp_path / "scores.json").read_text())["rows"].values()
    assert not {"blind", "majority"} & set(row)
    assert all(has_image for _, has_image in oracle.asked)


def test_scores_can_be_had_again_from_the_files(oracle: Oracle, tmp_path: Path) -> None:
    from sphinxkit.evaluation import benchmarks

    evaluate_nano("m", tmp_path, rows=ROWS[4:5], num_scenes=NUM_SCENES)
    here = tmp_path / "detection"
    assert benchmarks.score("detection", here / "annotations.json", here / "model.jsonl").scores["f1"] == 1.0


def test_the_majority_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "NUM_COUNTED", 60)
    world = World("synthetic", size=SIZE)
    answers = [world.conversation(index, "classification")[1][1]["content"] for index in range(60)]
    found = majority_answer("classification", SIZE, "synthetic")
    assert answers.count(found) == max(answers.count(answer) for answer in answers) > 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.task)
def test_right_answers_fit(row: scores.TableRow) -> None:
    """As the model learns them at 128 pixels, with what ends an answer."""
    tokenizer = Tokenizer(shipped_folder() / "nano" / "tokenizer.model")
    world = World("synthetic", "test", 128, scores.SEED, point_grid=128)
    for index in range(25):
        answer = world.conversation(index, row.task)[1][1]["content"]
        assert len(tokenizer.encode(" " + answer + "\n###")) < row.max_new_tokens


def test_the_table() -> None:
    rows = {
        "VQA": {"goal": 0.9, "model": 0.9514, "blind": 0.2, "majority": 0.1},
        "OCR": {"goal": 0.8, "model": 1.0},
    }
    assert table({"rows": rows}).splitlines() == [
        "| task | goal | SPHINX-nano | blind | most frequent answer |",
        "|---|---|---|---|---|",
        "| VQA | 0.90 | 0.951 | 0.200 | 0.100 |",
        "| OCR | 0.80 | 1.000 |  |  |",
    ]
