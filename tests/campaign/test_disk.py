"""A disk that is really full, and one that is read-only: needs root, to mount a small file system in memory."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import SphinxkitError

pytestmark = pytest.mark.campaign
NANO = "nano"
LLM = {"type": "llama", "vocab_size": 512, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}
Usage = collections.namedtuple("Usage", "total used free")


def _mounted(folder: Path, size: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(params=["full", "fills", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk that is full, that becomes full although it claimed to have room, or that is read-only."""
    folder = tmp_path / "disk"
    if not _mounted(folder, "64m" if request.param == "read-only" else "256k"):
        pytest.skip("needs to be root and to mount a tmpfs")
    try:
        if request.param == "full":
            with pytest.raises(OSError, match="No space left"):
                (folder / "rest").write_bytes(bytes(2**20))
        elif request.param == "fills":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**40))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0


def convert_data(work: Path, disk: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is it? " * 3}, {"from": "gpt", "value": "a bus"}]
    records = [{"id": str(index), "image": f"{index}.jpg", "conversations": turns} for index in range(4000)]
    (work / "in.json").write_text(json.dumps(records))
    _run("convert-data", work / "in.json", "--format", "llava", "-o", disk / "out.jsonl")


def generate(work: Path, disk: Path) -> None:
    rows = [{"id": index, "prompt": "How many?", "meta": "x" * 9000, "max_new_tokens": 1} for index in range(40)]
    (work / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _run("generate", NANO, "--input", work / "in.jsonl", "-o", disk / "out.jsonl", "--device", "cpu")


def evaluate(work: Path, disk: Path) -> None:
    records = [
        {"image_path": "", "question": "Is it red?", "question_id": "q" * 9000 + str(i), "gt_answers": "yes"}
        for i in range(40)
    ]
    (work / "a.json").write_text(json.dumps(records))
    options = ["--annotations", work / "a.json", "--images", work, "--max-new-tokens", 1, "--device", "cpu"]
    _run("evaluate", NANO, "vsr_val", *options, "-o", disk / "out.jsonl")


def convert(work: Path, disk: Path) -> None:
    _run("convert", NANO, "-o", disk / "model")


def convert_to_shards(work: Path, disk: Path) -> None:
    _run("convert", NANO, "-o", disk / "model", "--to", "meta", "--part", "llm")


def convert_to_hf(work: Path, disk: Path) -> None:
    _run("convert", NANO, "-o", disk / "model", "--to", "hf")


def mix(work: Path, disk: Path) -> None:
    _run("mix", NANO, NANO, "--beta", 0.5, "-o", disk / "model")


def save(work: Path, disk: Path) -> None:
    sphinxkit.load(str(sphinxkit.nano.path())).save(disk / "model")


def extract_delta(work: Path, disk: Path) -> None:
    _run("convert", NANO, "-o", work / "llm", "--to", "meta", "--part", "llm")
    _run("delta", "extract", work / "llm", work / "llm", "-o", disk / "model")


def _trained(work: Path, output: Path) -> None:
    (work / "texts.jsonl").write_text('{"text": "some words"}\n' * 4)
    document = {
        "kind": "train",
        "model": {"kind": "model", "llm": {**LLM, "embed_dim": 128, "hidden_dim": 128}},
        "tokenizer": str(Path(__file__).parents[2] / "recipes" / "sphinx_micro.model"),
        "data": {"texts": {"mixture": {"sources": [{"path": "texts.jsonl", "type": "text"}]}, "batch_size": 2}},
        **{"train": ["llm"], "output": str(output), "dtype": "float32", "device": "cpu", "num_workers": 0},
        "data_root": str(work),
    }
    (work / "train.yaml").write_text(json.dumps(document))
    _run("train", work / "train.yaml")


def train(work: Path, disk: Path) -> None:
    _trained(work, disk / "run")


def export(work: Path, disk: Path) -> None:
    _trained(work, work / "run")
    _run("export", work / "run", "-o", disk / "model")


RESUMED = ("out.jsonl.rank-0-of-1.part", "out.jsonl", "out.jsonl.manifest.json", "run")
"""What a run leaves for the next one to resume; whole lines count."""


@pytest.mark.parametrize(
    "command",
    [
        convert_data,
        generate,
        evaluate,
        convert,
        convert_to_shards,
        convert_to_hf,
        mix,
        extract_delta,
        save,
        train,
        export,
    ],
)
def test_no_room(
    command: Callable[[Path, Path], None], disk: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    torch.set_num_threads(1)
    before = sorted(disk.rglob("*"))
    with pytest.raises(SphinxkitError) as caught:
        command(work, disk)
    message = str(caught.value)
    sys.stdout.write(f"{request.node.name}: {message[:160]}\n")
    is_read_only = "read-only" in request.node.name
    wanted = ("Read-only file system",) if is_read_only else ("No space left", "disk is full", "the disk has")
    assert any(text in message for text in wanted)
    assert str(disk) in message
    left = [path for path in sorted(disk.rglob("*")) if path not in before]
    odd = [path for path in left if path.relative_to(disk).parts[0] not in RESUMED]
    assert not odd
