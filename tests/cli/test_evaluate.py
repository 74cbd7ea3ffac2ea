from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from sphinxkit.formatters.conversation import sphinx_v1


class Yes:
    conversation = sphinx_v1()
    dtype = torch.bfloat16
    device = torch.device("cpu")
    num_calls = 0

    def generate(self, prompts: Sequence[str], images: Sequence[Path], **options: Any) -> list[Any]:
        self.num_calls += 1
        return [SimpleNamespace(text=" yes") for _ in prompts]


def test_ask_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Yes()
    evaluate = importlib.import_module("sphinxkit.cli.evaluate")  # the package may hold the function by this name
    monkeypatch.setattr(evaluate, "load_model", lambda *_: model)
    app = typer.Typer()
    app.command("evaluate")(evaluate.evaluate)
    records = [
        {"image_path": "a.png", "question": "?", "question_id": i, "gt_answers": ("yes", "no")[i]} for i in (0, 1)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.png").touch()
    output = str(tmp_path / "p.jsonl")
    arguments = [
        "checkpoint",
        "vsr_val",
        "--annotations",
        str(tmp_path / "a.json"),
        "--images",
        str(tmp_path),
        "-o",
        output,
    ]
    for _ in range(2):  # the second time nothing is asked
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["scores"] == {"accuracy": 0.5}
        assert report["manifest"]["generation"]["dtype"] == "bfloat16"
        assert report["manifest"]["generation"]["checkpoint"] == "checkpoint"
    assert model.num_calls == 1
