"""The page "Fine-tune on your data", step by step, with the micro model in the place of SPHINX-v2-1k."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "fine_tune.md"
BLOCK = re.compile(r"^```(python|bash|yaml|json)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {"model": "sphinx_micro", "dtype": "float32", "device": "cpu", "num_workers": 0, "pack_tokens": 256}


@pytest.mark.slow
def test_from_a_json_file_to_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sphinxkit.build("sphinx_micro").save("SPHINX-v2-1k")
    Path("images").mkdir()
    rows = []
    for number in range(20):
        name = f"shelf_{number:03}.jpg"
        Image.new("RGB", (40, 30), (12 * number, 99, 0)).save(f"images/{name}")
        rows.append({"image": name, "question": "How many bottles are on the shelf?", "answer": str(number % 3)})
    printed: list[str] = []
    for language, block in BLOCK.findall(PAGE.read_text()):
        if language == "json":
            assert json.loads(block)[0].keys() == rows[0].keys()
            Path("questions.json").write_text(json.dumps(rows))
        elif language == "yaml":
            recipe = yaml.safe_load(block)
            assert recipe["model"] == "sphinx_1k_13b"
            Path("fine_tune.yaml").write_text(yaml.safe_dump(recipe | SMALL | {"evaluate_every": 2}))
        elif language == "python":
            exec(compile(block, str(PAGE), "exec"), {})
        else:
            for line in block.splitlines():
                done = CliRunner().invoke(app, shlex.split(line)[1:])
                assert done.exit_code == 0, f"{line}: {done.output}"
                printed.append(done.output)
    assert len(printed) == 5
    evaluations = [json.loads(line) for line in Path("runs/shelves/evaluations.jsonl").read_text().splitlines()]
    losses = [record["losses"]["held_out"] for record in evaluations]
    assert losses[-1] < losses[0]
    assert (Path("runs/shelves/adapter") / "adapter_config.json").is_file()
