"""A micro model and a handful of made-up samples; everything takes milliseconds."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sphinxkit.training import Callback, TrainPlan, TrainResult, train

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
        "num_workers": 0,
        "save_every": 3,
        "async_save": False,
        "export": False,
    }
    return document | changes


class Recorder(Callback):
    """Keeps what a run tells; ``hook`` is called with every record."""

    def __init__(self, hook: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.hook = hook
        self.records: list[Any] = []
        self.checkpoints: list[tuple[int, Path]] = []
        self.results: list[TrainResult | None] = []

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        if self.hook is not None:
            self.hook(record)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.checkpoints.append((step, folder))

    def on_end(self, result: TrainResult | None) -> None:
        self.results.append(result)


@pytest.fixture
def recorder() -> type[Recorder]:
    """A callback that keeps what a run tells."""
    return Recorder


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the samples; not to be changed."""
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    return folder


@pytest.fixture
def document(samples: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes a plan's document; keywords replace keys."""
    return lambda **changes: make_document(samples, **{"output": str(tmp_path / "run"), **changes})


@pytest.fixture(scope="session")
def straight(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that nothing disturbs."""
    torch.set_num_threads(1)  # as in every test here; this may run before any
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert train(TrainPlan(**make_document(samples, output=str(folder), export=True))).status == "done"
    return folder


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Runs in a process that was forked from one that had imported everything: starting is cheap.
RUNNER = """
import os, signal, sys, traceback, warnings
log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
os.environ.update(environment)
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
from sphinxkit.training import Callback, TrainPlan, train
class Killer(Callback):
    def on_step(self, record):
        if record["step"] + 1 == at:
            os.kill(os.getpid(), getattr(signal, kill))
exec(setup)
try:
    train(TrainPlan(**document), callbacks=[Killer()])
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""


PRELOAD = [
    "sphinxkit.training",
    "open_clip",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "matplotlib.figure",
]


@pytest.fixture(scope="session")
def forks() -> Any:
    """Starts processes that have torch and sphinxkit loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@pytest.fixture
def run_processes(forks: Any, tmp_path: Path) -> Callable[..., list[int]]:
    """Trains in processes of their own, set up as torchrun does it, with gloo on the CPU; gives their exit codes."""

    def run(
        document: dict[str, Any], processes: int = 1, at: int | None = None, kill: str = "", setup: str = ""
    ) -> list[int]:
        common = {"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(processes)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = []
        for rank in range(processes):
            values = {
                "document": document,
                "environment": common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                "log_file": str(tmp_path / f"process{rank}.log"),
                "at": at,
                "kill": kill,
                "setup": setup,
            }
            started.append(forks.Process(target=exec, args=(RUNNER, values)))
            started[-1].start()
        for process in started:
            process.join(timeout=200)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        if not kill:
            logs = "".join((tmp_path / f"process{rank}.log").read_text()[-3000:] for rank in range(processes))
            assert codes == [0] * processes, logs
        return codes

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
