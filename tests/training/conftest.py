"""A micro model and a handful of made-up samples; everything takes milliseconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "recipes" / "sphinx_micro.model"

MODEL = {
    "kind": "model",
    "vision": {
        "image_size": 28,
        "branches": [
            {
                "encoders": [
                    {
                        "type": "clip_vit_large_patch14",
                        "image_size": 28,
                        "embed_dim": 8,
                        "num_layers": 1,
                        "num_heads": 2,
                    }
                ],
                "projector": "linear",
            }
        ],
    },
    "llm": {
        "type": "llama",
        "vocab_size": 512,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim": 32,
        "max_seq_len": 512,
    },
}


def write_samples(folder: Path) -> None:
    """24 captions with images and 24 texts of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, texts = [], []
    for number in range(24):
        color = (number * 10, 255 - number * 10, number * 5)
        Image.new("RGB", (20 + number, 30), color).save(folder / f"{number}.png")
        answer = " ".join(f"w{number + extra}" for extra in range(1 + number % 5))
        captions.append(
            {
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is number {number}?"},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
        texts.append({"text": " ".join(f"word {number} of {extra}" for extra in range(1 + number % 7))})
    for name, records in (("captions", captions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_document(folder: Path, **changes: Any) -> dict[str, Any]:
    """A plan over both kinds of samples, in float32 on the CPU."""
    sources = {"captions": "image-text", "texts": "text"}
    document: dict[str, Any] = {
        "model": MODEL,
        "tokenizer": str(TOKENIZER),
        "data": {
            name: {
                "mixture": {"sources": [{"path": str(folder / f"{name}.jsonl"), "type": kind}]},
                "batch_size": 8,
                "weight": 1.0 if name == "captions" else 0.5,
            }
            for name, kind in sources.items()
        },
        "output": str(folder / "run"),
        "allow_random_encoders": True,
        "steps": 8,
        "lr": 1e-2,
        "dtype": "float32",
        "device": "cpu",
        "pack_tokens": 256,
        "workers": 0,
        "save_every": 3,
        "async_save": False,
        "export": False,
    }
    return document | changes


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Folder with the samples."""
    write_samples(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def document(samples: Path) -> Callable[..., dict[str, Any]]:
    """Makes a plan's document; keywords replace keys."""
    return lambda **changes: make_document(samples, **changes)


RUNNER = """
import json, sys, os, signal, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
from sphinxkit.training import TrainPlan, train
document, behaviour = json.loads(sys.argv[1]), json.loads(sys.argv[2])
def report(record):
    if record["step"] + 1 == behaviour.get("at"):
        os.kill(os.getpid(), getattr(signal, behaviour["signal"]))
result = train(TrainPlan(**document), report=report)
if os.environ.get("RANK", "0") == "0":
    print(json.dumps({"status": result.status, "step": result.step}))
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def run_processes() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Trains in processes of their own, set up as torchrun does it, with gloo on the CPU."""

    def run(
        document: dict[str, Any], processes: int = 1, at: int | None = None, kill: str = "", check: bool = True
    ) -> list[subprocess.CompletedProcess[str]]:
        common = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        if processes > 1:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            common |= place
        arguments = [sys.executable, "-c", RUNNER, json.dumps(document), json.dumps({"at": at, "signal": kill})]
        started = []
        for rank in range(processes):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True))
        results = []
        for process in started:
            out, err = process.communicate(timeout=240)
            results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        for result in results:
            assert not check or result.returncode == 0, result.stderr[-4000:]
        return results

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
