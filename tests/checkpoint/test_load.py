from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.checkpoint import MappingSource, ModuleSource
from sphinxkit.errors import CheckpointError

# Weights of the memory test, and what may come on top of them: 10 % as promised.
MEGABYTES = 96
ALLOWANCE = 1.10


class Small(nn.Module):
    """A parameter of each kind: tied, frozen, a saved and an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm.weight.requires_grad_(False)


class Table(nn.Module):
    """Keeps a table that is not saved; can it be remade?"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


class RemakingTable(Table):
    def init_non_persistent_buffers(self) -> None:
        self.table.copy_(torch.arange(3.0))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("llama_type", ["llama_ens5", "llama_ens_light"])
def test_released_checkpoint_into_the_model_its_recipe_builds(golden: Path, llama_type: str) -> None:
    from sphinxkit.recipe import Recipe
    from sphinxkit.recipe.build import build_on_meta

    with checkpoint.open(golden / llama_type) as opened:
        model = build_on_meta(Recipe(opened.recipe), torch.float32)
        report = checkpoint.load_into(model, opened, device="cpu", dtype=torch.float32)
        assert set(report.loaded) == set(opened.keys())
        assert report.missing == report.unexpected == ()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, opened.read(name)), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name  # its own memory, not the file's
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_ties_flags_and_buffers_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = Small()
    original.norm.running_mean += 3
    original.norm.num_batches_tracked += 7
    folder = checkpoint.save(tmp_path / "small", ModuleSource(original))
    module = on_meta(Small)
    with checkpoint.open(folder) as opened:
        checkpoint.load_into(module, opened, dtype=torch.bfloat16)
    assert module.head.weight is module.embed.weight
    assert isinstance(module.embed.weight, nn.Parameter)
    assert torch.equal(module.embed.weight, original.embed.weight.bfloat16())
    assert module.embed.weight.requires_grad
    assert not module.norm.weight.requires_grad
    assert "running_mean" in dict(module.norm.named_buffers())
    assert torch.equal(module.norm.running_mean, torch.full((4,), 3.0, dtype=torch.bfloat16))
    assert module.norm.num_batches_tracked.item() == 7
    assert module.norm.num_batches_tracked.dtype == torch.int64


def test_dtype_is_that_of_the_file_unless_one_is_asked_for() -> None:
    source = MappingSource({"weight": torch.ones(1, 2).half(), "bias": torch.ones(1)})
    module = on_meta(lambda: nn.Linear(2, 1))
    checkpoint.load_into(module, source)
    assert (module.weight.dtype, module.bias.dtype) == (torch.float16, torch.float32)
    checkpoint.load_into(module, source, dtype=torch.float64)
    assert (module.weight.dtype, module.bias.dtype) == (torch.float64, torch.float64)


def test_one_tied_name_is_enough() -> None:
    tensors = {name: tensor for name, tensor in Small().state_dict().items() if name != "head.weight"}
    module = on_meta(Small)
    checkpoint.load_into(module, MappingSource(tensors))
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, tensors["embed.weight"])


def test_everything_wrong_is_in_one_error() -> None:
    tensors = dict(Small().state_dict())
    tensors["norm.bias"] = torch.zeros(3)
    tensors["norm.wieght"] = tensors.pop("norm.weight")
    tensors["head.weight"] = tensors["head.weight"] + 1
    tensors["extra"] = torch.zeros(1)
    module = Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="the checkpoint does not fit the model") as caught:
        checkpoint.load_into(module, MappingSource(tensors))
    for text in (
        "'norm.bias' is [3] in the checkpoint, [4] in the model",
        "'norm.weight' is missing in the checkpoint; did you mean 'norm.wieght'?",
        "'norm.wieght' is in the checkpoint but not in the model; did you mean 'norm.weight'?",
        "'head.weight' is tied to 'embed.weight' in the model but differs from it in the checkpoint",
        "'extra' is in the checkpoint but not in the model",
    ):
        assert text in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_not_strict_loads_what_fits_and_says_what_it_left() -> None:
    tensors = {"embed.weight": torch.ones(5, 4), "extra": torch.zeros(1)}
    module = on_meta(Small)
    report = checkpoint.load_into(module, MappingSource(tensors), strict=False)
    assert report.loaded == ("embed.weight",)
    assert report.unexpected == ("extra",)
    assert set(report.missing) == set(Small().state_dict()) - {"embed.weight", "head.weight"}
    assert module.norm.weight.is_meta
    with pytest.raises(CheckpointError, match=r"'embed.weight' is \[5, 3\] in the checkpoint"):
        checkpoint.load_into(module, MappingSource({"embed.weight": torch.ones(5, 3)}), strict=False)


def test_unsaved_buffers_are_remade_or_reported() -> None:
    source = MappingSource({"0.weight": torch.ones(2)})
    module = on_meta(lambda: nn.Sequential(RemakingTable()))
    checkpoint.load_into(module, source)
    assert module[0].table.tolist() == [0.0, 1.0, 2.0]
    assert list(module.state_dict()) == ["0.weight"]
    with pytest.raises(CheckpointError, match=r"buffer '0.table' is not saved .* init_non_persistent_buffers"):
        checkpoint.load_into(on_meta(lambda: nn.Sequential(Table())), source)
    real = nn.Sequential(Table())
    checkpoint.load_into(real, source)
    assert real[0].table.tolist() == [0.0, 1.0, 2.0]


def test_a_foreign_source_will_do() -> None:
    class Constant:
        def keys(self) -> list[str]:
            return ["weight"]

        def shape(self, key: str) -> tuple[int, ...]:
            return (2, 2)

        def dtype(self, key: str) -> torch.dtype:
            return torch.float32

        def read(self, key: str) -> Tensor:
            return torch.full((2, 2), 4.0)

    module = on_meta(lambda: nn.Linear(2, 2, bias=False))
    checkpoint.load_into(module, Constant(), dtype=torch.float16)
    assert module.weight.tolist() == [[4.0, 4.0], [4.0, 4.0]]


def test_saved_model_comes_back(golden: Path, tmp_path: Path) -> None:
    model = sphinxkit.load(golden / "llama_ens_light")
    model.save(tmp_path / "own")
    again = sphinxkit.load(tmp_path / "own")
    for (name, one), (other_name, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)


PROBE = """
import sys, threading, time
from pathlib import Path
import torch
from torch import nn
from sphinxkit import checkpoint

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

folder, width, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with torch.device("meta"):
    model = nn.Module()
    model.llm = nn.Module()
    model.llm.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.attention = nn.Module()
        layer.attention.q_proj = nn.Linear(width, width, bias=False)
        layer.attention.o_proj = nn.Linear(width, width, bias=False)
        layer.attention_norm = nn.Module()
        layer.attention_norm.weight = nn.Parameter(torch.empty(width * width))
        model.llm.layers.append(layer)
torch.ones(8).bfloat16().float()  # what torch takes for itself
before, peak, running = anonymous(), [0], [True]

def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
with checkpoint.open(folder) as opened:
    with opened.verifying():
        checkpoint.load_into(model, opened, dtype=torch.bfloat16)
running[0] = False
thread.join()
print(peak[0] - before, sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_peak_memory_is_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    width = 1024
    layers = MEGABYTES * 2**20 // (3 * 2 * width * width)
    for rank in (0, 1):
        tensors: dict[str, Any] = {}
        for index in range(layers):
            tensors |= {
                f"llma.layers.{index}.attention.wq.weight": torch.ones(width // 2, width, dtype=dtype),
                f"llma.layers.{index}.attention.wo.weight": torch.ones(width, width // 2, dtype=dtype),
                f"llma.layers.{index}.attention_norm.weight": torch.ones(width * width, dtype=dtype),
            }
        torch.save({"model": tensors}, tmp_path / f"consolidated.0{rank}-of-02.model.pth")
        del tensors
    command = [sys.executable, "-c", PROBE, str(tmp_path), str(width), str(layers)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    peak, weights = map(int, result.stdout.split())
    assert weights == layers * 3 * 2 * width * width
    assert weights * 0.9 < peak < weights * ALLOWANCE, (peak, weights)


@pytest.mark.gpu
def test_straight_to_cuda(golden: Path) -> None:
    model = sphinxkit.load(golden / "llama_ens5", device="cuda", dtype=torch.bfloat16)
    with checkpoint.open(golden / "llama_ens5") as opened:
        for name, tensor in model.state_dict().items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), opened.read(name).bfloat16()), name
