from __future__ import annotations

import hypothesis.extra.numpy as npst
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

FP32_ROUNDING = 1e-6  # a handful of float32 roundings (6e-8 each) on values of order one


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def vectors(count: int) -> st.SearchStrategy[list[Tensor]]:
    size = st.shared(st.integers(1, 40), key="size")
    values = st.floats(-100, 100, width=32)
    one = size.flatmap(lambda n: npst.arrays(np.float32, n, elements=values))
    return st.lists(one, min_size=count, max_size=count).map(lambda arrays: [torch.from_numpy(a) for a in arrays])
