"""The whole system on a CUDA device that is not there: nothing mixes devices, and the host waits where it says so.

What is on the device has a shape, a dtype and a place, but no numbers. Whatever mixes it with a tensor of the CPU fails
as it would there, and each wait of the host for the device is noted: for what comes back, which is made up (``TOKEN``
everywhere), and for what goes there other than by ``to_device``.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sphinxkit
from sphinxkit.llama.backends import xformers
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.to_device import to_device

IMAGE = str(Path(__file__).parent.parent / "docs" / "images" / "nano_scene.png")
CHUNK = 8  # tokens that a GPU decodes before the host looks at them
TOKEN = 7
_PACKAGE = str(Path(sphinxkit.__file__).parent)
_aten = torch.ops.aten


class PretendedCuda(TorchDispatchMode):
    """While it is on, tensors of the device "cuda" are fakes and all others are real.

    Args:
        monkeypatch: Undoes afterwards what it changes in torch.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        torch._C._ensureCUDADeviceGuardSet()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()
        for name, value in (("is_available", True), ("current_device", 0), ("device_count", 1), ("_lazy_init", None)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist(), raising=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_on_device = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        device = torch.device(kwargs.get("device") or "cpu")
        if not is_on_device:
            if device.type != "cuda":
                return func(*args, **kwargs)
            if args and isinstance(args[0], Tensor):
                self._sent(kwargs.get("non_blocking", False))
            with self._fakes:
                moved = [self._fakes.from_tensor(each) if isinstance(each, Tensor) else each for each in args]
                return func(*moved, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return self._fetch(args[0]).item()
        if func is _aten._to_copy.default and kwargs.get("device") is not None and device.type == "cpu":
            return self._fetch(args[0])
        if func is _aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].copy_(self._fetch(args[1]))
        if func is _aten.copy_.default and not isinstance(args[1], FakeTensor):
            self._sent(len(args) > 2 and args[2])
            return args[0]
        if func is _aten.nonzero.default:
            size = max(1, args[0].numel() // 2)
            self.waits[_line()] += 1
            with self._fakes:
                return torch.zeros(size, args[0].ndim, dtype=torch.long, device="cuda")
        return func(*args, **kwargs)

    def _sent(self, without_waiting: bool) -> None:
        self.uploads[_line()] += 1
        if not without_waiting:
            self.waits[_line()] += 1

    def _fetch(self, tensor: Tensor) -> Tensor:
        self.waits[_line()] += 1
        return torch.full(tensor.shape, TOKEN if tensor.dtype != torch.bool else 1, dtype=tensor.dtype)

    @contextmanager
    def counted(self) -> Iterator[collections.Counter[str]]:
        """The waits of what runs inside, by the line that waited."""
        before = self.waits.copy()
        found: collections.Counter[str] = collections.Counter()
        yield found
        found.update(self.waits - before)

    def place(self, module: nn.Module) -> None:
        """Move a module there, from meta."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cuda"))
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty_like(buffer, device="cuda")


def _line() -> str:
    """The line of the package that is at work."""
    frames = traceback.extract_stack()
    frame = next((each for each in reversed(frames) if each.filename.startswith(_PACKAGE)), frames[0])
    return f"{Path(frame.filename).name}: {frame.line}"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    monkeypatch.setattr(xformers, "xformers_fault", lambda *args: "pretended")  # its probe needs numbers
    pretended = PretendedCuda(monkeypatch)
    with pretended:
        try:
            torch.ones(1, device="cuda")
        except RuntimeError as error:
            pytest.skip(f"this torch asks for a driver for fake tensors, too: {error}")
    return pretended


@pytest.fixture
def model(cuda: PretendedCuda) -> SphinxModel:
    found = sphinxkit.build("sphinx_micro", device="meta", dtype=torch.bfloat16)
    with cuda:
        cuda.place(found)
    return found.requires_grad_(False)


def test_a_cpu_tensor_does_not_mix_with_the_device(cuda: PretendedCuda) -> None:
    with cuda:
        there = torch.ones(2, device="cuda")
        assert (there + 1).is_cuda
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(2)
        with cuda.counted() as waits:
            assert there.long().tolist() == [7, 7]
            assert int(there.sum()) == 7
            assert torch.zeros(2).copy_(there).tolist() == [7, 7]
            assert torch.zeros(2).to("cuda").is_cuda
            there.copy_(torch.zeros(2))
            assert to_device([1, 2], "cuda").is_cuda
    assert sum(waits.values()) == 5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_waits_once_for_the_first_token_and_once_for_each_chunk(
    cuda: PretendedCuda, model: SphinxModel, temperature: float
) -> None:
    with cuda, cuda.counted() as waits:
        found = model.generate(
            ["What is it?", "And a longer question?"],
            images=[IMAGE] * 2,
            max_new_tokens=1 + 2 * CHUNK,
            temperature=temperature,
            stop=None,
        )
    assert [len(each.token_ids) for each in found] == [1 + 2 * CHUNK] * 2
    assert sorted(waits.values()) == [1, 2], waits


@pytest.mark.slow
def test_a_second_question_and_a_draft(cuda: PretendedCuda, model: SphinxModel) -> None:
    with cuda:
        session = model.session(image=IMAGE)
        for question in ("What?", "Where?"):
            assert session.ask(question, max_new_tokens=CHUNK)
        assert model.generate("so it is so it is so", max_new_tokens=CHUNK, num_draft_tokens=3)
        assert len(model.score(["It is"], ["red"], images=[IMAGE])) == 1


def test_a_loss_waits_once(cuda: PretendedCuda, model: SphinxModel) -> None:
    with cuda:
        ids = torch.randint(3, 500, (2, 30)).to("cuda")
        pixels = torch.rand(2, 3, 448, 448).to("cuda", torch.bfloat16)
        with cuda.counted() as waits:
            loss = model.loss(ids, ids, pixels)
    assert isinstance(loss, FakeTensor)
    assert sum(waits.values()) == 1, waits
