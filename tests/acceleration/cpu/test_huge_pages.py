from __future__ import annotations

import copy
import mmap
import pickle
from collections.abc import Callable

import pytest
import torch

from sphinxkit.acceleration import FusedAccelerator
from sphinxkit.acceleration.cpu import huge_pages
from sphinxkit.llama import LlamaModel

PAGE = 2 << 20


@pytest.mark.parametrize("num_elements", [1, PAGE, 2 * PAGE + 3])
def test_memory_is_writable_and_of_the_size_that_was_asked_for(num_elements: int) -> None:
    memory = huge_pages.empty(num_elements, torch.bfloat16)
    memory.fill_(1.5)
    assert memory.shape == (num_elements,)
    assert memory.dtype == torch.bfloat16
    assert memory.untyped_storage().nbytes() == 2 * num_elements
    assert bool((memory == 1.5).all())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux only")
def test_large_memory_starts_with_a_page_and_goes_with_its_last_tensor() -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * mmap.PAGESIZE

    before = mapped()
    memory = huge_pages.empty(32 * PAGE, torch.float32)
    assert memory.data_ptr() % PAGE == 0
    part = memory[5:7]
    del memory
    part.fill_(2.0)
    assert part.tolist() == [2.0, 2.0]
    assert mapped() - before >= 4 * 32 * PAGE
    del part
    assert mapped() - before < 2 * 32 * PAGE


def test_where_pages_are_refused_it_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("no large pages here")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert huge_pages.empty(2 * PAGE, torch.float32).fill_(3.0).sum() == 6.0 * PAGE
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages.empty(2 * PAGE, torch.float32).fill_(3.0).sum() == 6.0 * PAGE


def test_tensors_that_share_a_region_are_saved_by_themselves() -> None:
    region = huge_pages.Region(12, torch.float32)
    whole, part = region.tensor(0, 12), region.tensor(4, 3)
    whole.copy_(torch.arange(12.0))
    assert part.tolist() == [4, 5, 6]
    part.mul_(10)
    assert whole[4:7].tolist() == [40, 50, 60]
    assert part.untyped_storage().nbytes() == 12
    assert len(pickle.dumps(part)) < len(pickle.dumps(torch.zeros(3))) + 10


def test_an_accelerated_model_is_the_same_there(
    ready_llama: Callable[..., LlamaModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_MIN_BYTES", 1)
    model = ready_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embeds = model.embed(torch.arange(7)[None])
    expected = model(embeds)
    model.accelerator = FusedAccelerator()
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same.prefill(embeds, same.make_cache(1), all_positions=True), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.layers[1].attention.q_proj.weight.data_ptr() % PAGE == 0
    assert model.lm_head.weight.data_ptr() % PAGE == 0
