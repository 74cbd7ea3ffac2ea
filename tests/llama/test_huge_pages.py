from __future__ import annotations

import copy
import mmap
import pickle
from collections.abc import Callable

import pytest
import torch

from sphinxkit.llama import LlamaModel, huge_pages

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


def test_a_fused_model_is_the_same_there(
    small_llama: Callable[..., LlamaModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_MIN_BYTES", 1)
    model = small_llama().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embeds = model.embed(torch.arange(7)[None])
    expected = model(embeds)
    model.fuse()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert model.layers[1].attention.q_proj.weight.data_ptr() % PAGE == 0
        assert model.lm_head.weight.data_ptr() % PAGE == 0
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(embeds, cache=same.make_cache(1)), expected)
