from __future__ import annotations

import pytest
import torch

from sphinxkit.llama import AttentionPattern, KVCache
from sphinxkit.llama.backends.sdpa import SDPAAttention

CPU = torch.device("cpu")


def test_no_mask_where_the_causal_flag_will_do() -> None:
    backend = SDPAAttention()
    assert backend.prepare(AttentionPattern(2, 16, CPU), torch.float32) is None
    assert backend.prepare(AttentionPattern(1, 20, CPU, seq_lens=(2, 18)), torch.float32) is None


@pytest.mark.parametrize("length", [1, 5, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan(length: int, dtype: torch.dtype) -> None:
    """torch's kernel makes 0 of it in short rows without a mask."""
    backend, pattern = SDPAAttention(), AttentionPattern(1, length, CPU)
    x = torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    nan = torch.full_like(x, torch.nan)
    state = backend.prepare(pattern, dtype)
    for q, k in ((nan, x), (x, nan)):
        assert bool(backend.attend(q, k, x, pattern, state).isnan().all())
    cache = KVCache(1, 1, 64, 2, 8, dtype=dtype)
    cache.lengths.fill_(length - 1)
    token = AttentionPattern(1, 1, CPU, write=cache.prepare_write(1))
    state = backend.prepare(token, dtype)
    assert bool(backend.attend(nan[:, :, :1], x, x, token, state).isnan().all())
    torch.testing.assert_close(
        backend.attend(x, x, x, pattern, backend.prepare(pattern, dtype)),
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        rtol=0,
        atol=0,  # the mask is another way to say the same
    )


def test_the_mask_of_a_window() -> None:
    mask = SDPAAttention().prepare(AttentionPattern(1, 3, CPU, window=2), torch.bfloat16)
    assert mask is not None
    assert mask.dtype == torch.bfloat16
    far = -torch.inf
    assert mask[0, 0].tolist() == [[0, far, far], [0, 0, far], [far, 0, 0]]
