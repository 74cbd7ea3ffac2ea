"""``sphinxkit generate`` beyond one prompt; a killed run and torchrun are in tests/batch_inference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.cli.options import pick_device


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt or --input"),
        (["-p", "a", "--input", "b"], "give either --prompt or --input"),
        (["--input", "b"], "--input goes with --output"),
        (["-p", "a", "--root", "b"], "--root goes with --input"),
        (["-p", "a", "-o", "b"], "--input goes with --output"),
        (["--input", "b", "-o", "c", "-i", "d"], "names images in its rows"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "model", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_file_of_prompts_and_drafts(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "What?"}\n{"prompt": "Why?"}\nnonsense\n')
    output = tmp_path / "out.jsonl"
    arguments = ["generate", str(golden / "llama_ens"), "--device", "cpu", "--dtype", "float32"]
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(output), "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, [*arguments, *files, "--num-draft-tokens", "3"], catch_exceptions=False)
    assert result.exit_code == 1  # a row has no answer
    assert result.stdout.startswith("2 rows answered, 0 were before, 1 with an error:")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    model = sphinxkit.load(golden / "llama_ens")
    expected = [model.chat([{"role": "user", "content": text}], max_new_tokens=6) for text in ("What?", "Why?")]
    assert [answer["text"] for answer in answers[:2]] == expected
    assert "not JSON" in answers[2]["error"]
    one = [*arguments, "-p", "What?", "--max-new-tokens", "6", "--num-draft-tokens", "3", "--json"]
    fields = json.loads(CliRunner().invoke(app, one, catch_exceptions=False).stdout)
    assert fields["token_ids"] == answers[0]["token_ids"]
    assert fields["num_accepted"] <= fields["num_drafted"]


def test_with_torchrun_a_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
