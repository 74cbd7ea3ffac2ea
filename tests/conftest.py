from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from sphinxkit.llama import LlamaModel

# Laws are tried on few examples by default: `pytest -m property --hypothesis-profile=large` tries many.
settings.register_profile("small", max_examples=15, deadline=None)
settings.register_profile("large", max_examples=300, deadline=None)
settings.load_profile("small")

os.environ["SPHINXKIT_CACHE"] = tempfile.mkdtemp(prefix="sphinxkit-tests-")
atexit.register(shutil.rmtree, os.environ["SPHINXKIT_CACHE"], ignore_errors=True)

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, in the processes that tests start too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the data obtained from the public implementation (see tests/golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def small_llama() -> Callable[..., LlamaModel]:
    """Builds a small model with grouped heads and seeded weights whose norms are not 1."""

    from sphinxkit.llama import llama

    def build(seed: int = 0, **options: object) -> LlamaModel:
        sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 48}
        model = llama(**{**sizes, "vocab_size": 61, "max_seq_len": 64, **options})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5, generator=generator)
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        return model

    return build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(getattr(item, "function", None), "is_hypothesis_test", False):
            item.add_marker("property")
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
