from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sphinxkit.llama import LlamaModel

TOLERANCE = 1e-12  # float64 on both sides


def test_a_layer_by_its_formula(small_llama: Callable[..., LlamaModel]) -> None:
    # one token attends to itself alone: attention is o_proj(v), each key head's value for its group of query heads
    model = small_llama(num_layers=1).double()
    block = model.layers[0]
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def norm(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + model.norm.eps).sqrt() * scale

    weights = dict(block.named_parameters())
    value = norm(x, weights["attention_norm.weight"]) @ weights["attention.v_proj.weight"].T
    heads = value.reshape(1, 1, 2, 8).repeat_interleave(2, dim=2).reshape(1, 1, 32)
    after = x + heads @ weights["attention.o_proj.weight"].T
    normed = norm(after, weights["mlp_norm.weight"])
    gate, up = normed @ weights["mlp.gate_proj.weight"].T, normed @ weights["mlp.up_proj.weight"].T
    expected = after + (F.silu(gate) * up) @ weights["mlp.down_proj.weight"].T
    hidden = model.hidden_states(x)
    torch.testing.assert_close(hidden, norm(expected, model.norm.weight), atol=TOLERANCE, rtol=0)
