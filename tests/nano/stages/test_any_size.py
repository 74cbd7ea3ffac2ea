"""Scores on pictures of many sizes: what is drawn, what is shrunk, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sphinxkit.nano.stages import any_size
from sphinxkit.nano.stages.any_size import PICTURES, Pictures, any_size_table, evaluate_any_size
from sphinxkit.nano.stages.scores import MORE_ROWS, ROWS, chart_cells, evaluate_nano
from tests.nano.stages.test_scores import oracle

__all__ = ["oracle"]


@pytest.mark.usefixtures("oracle")
def test_pictures_are_of_the_size_and_are_shrunk(tmp_path: Path) -> None:
    rows = (ROWS[2],)
    sizes = (Pictures(200, 150), Pictures(256, 128, (128, 64)))
    assert evaluate_any_size("m", tmp_path, pictures=sizes, rows=rows, num_scenes=2)
    found = json.loads((tmp_path / "any_size.json").read_text())
    assert list(found["pictures"]) == ["200x150", "256x128-128x64"]
    assert list(found["pictures"]["200x150"]) == ["rec"]
    for name, size, drawn in (("200x150", (200, 150), (200, 150)), ("256x128-128x64", (128, 64), (256, 128))):
        here = tmp_path / name / "rec"
        pictures = sorted((here / "images").glob("*.png"))
        assert len(pictures) == 2
        for path in pictures:
            with Image.open(path) as image:
                assert image.size == size
        (first, *_) = json.loads((here / "annotations.json").read_text())
        assert (first["width"], first["height"]) == drawn  # boxes are shares of the picture they were drawn on


@pytest.mark.usefixtures("oracle")
def test_it_stops_between_parts(tmp_path: Path) -> None:
    assert not evaluate_any_size(
        "m", tmp_path, pictures=PICTURES[:1], rows=ROWS[:1], num_scenes=1, should_stop=lambda: True
    )
    assert not (tmp_path / "any_size.json").exists()


def test_cells_of_a_chart(tmp_path: Path) -> None:
    annotations, predictions = tmp_path / "annotations.json", tmp_path / "model.jsonl"
    golds = {"a": "KA | 3\nBO | 14", "b": "LU | 7"}
    annotations.write_text(json.dumps([{"question_id": key, "gt_answers": text} for key, text in golds.items()]))
    told = {"a": "KA | 3\nBO | 15\nXI | 1", "b": "7 | LU"}
    predictions.write_text(
        "\n".join(json.dumps({"question_id": key, "answer": text}) for key, text in told.items()) + "\n"
    )
    assert chart_cells(annotations, predictions) == pytest.approx(3 / 6)


@pytest.mark.usefixtures("oracle")
def test_charts_and_choices_have_scores(tmp_path: Path) -> None:
    assert evaluate_nano("m", tmp_path, rows=MORE_ROWS, num_scenes=2, baselines=False, size=200)
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert {row["task"]: row["score"] for row in rows.values()} == {"multiple_choice": "accuracy", "chart": "cells"}


def test_the_columns_are_the_goals() -> None:
    names = [pictures.name for pictures in any_size.PICTURES]
    assert len(set(names)) == len(names)
    assert {max(p.width, p.height) for p in any_size.PICTURES if p.shrink_to is None} == {96, 128, 200, 448, 1000}


def test_the_table() -> None:
    after: dict[str, Any] = {"pictures": {"128x96": {"rec": 0.95, "vqa": 0.9}, "256x128-128x64": {"rec": 0.5}}}
    before: dict[str, Any] = {"pictures": {"128x96": {"rec": 0.6}}}
    assert any_size_table(after, before).splitlines() == [
        "| pictures | rec | vqa |",
        "|---|---|---|",
        "| 128 x 96 | 0.60 → 0.95 | 0.90 |",
        "| 256 x 128 shrunk to 128 x 64 | 0.50 |  |",
    ]
