from __future__ import annotations

import torch

from sphinxkit.llama import AttentionPattern
from sphinxkit.llama.backends.sdpa import SDPAAttention

CPU = torch.device("cpu")


def test_no_mask_where_the_causal_flag_will_do() -> None:
    backend = SDPAAttention()
    assert backend.prepare(AttentionPattern(2, 3, CPU), torch.float32) is None
    assert backend.prepare(AttentionPattern(1, 5, CPU, seq_lens=(2, 3)), torch.float32) is None


def test_the_mask_of_a_window() -> None:
    mask = SDPAAttention().prepare(AttentionPattern(1, 3, CPU, window=2), torch.bfloat16)
    assert mask is not None
    assert mask.dtype == torch.bfloat16
    far = -torch.inf
    assert mask[0, 0].tolist() == [[0, far, far], [0, 0, far], [far, 0, 0]]
