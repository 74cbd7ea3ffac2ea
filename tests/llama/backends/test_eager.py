from __future__ import annotations

import torch

from sphinxkit.llama import AttentionPattern
from sphinxkit.llama.backends.eager import EagerAttention


def test_two_tokens_by_hand() -> None:
    # keys 0 and ln 3 / sqrt(D): the second query weighs them 1 : 3; the first sees itself alone
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 2, 4)
    k, v = torch.zeros(1, 1, 2, 4), torch.tensor([[1.0, 0, 0, 0], [5.0, 0, 0, 0]])[None, None]
    k[0, 0, 1, 0] = 2 * torch.log(torch.tensor(3.0))
    backend, pattern = EagerAttention(), AttentionPattern(1, 2, torch.device("cpu"))
    out = backend.attend(q, k, v, pattern, backend.prepare(pattern, torch.float32))
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([1.0, 4.0]))
