"""Models with biases, norms of queries and keys, other head widths, windows and scaled positions, accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sphinxkit.acceleration import accelerate
from sphinxkit.acceleration.accelerator import FusedAccelerator, obstacle
from sphinxkit.acceleration.compiled import CompiledAccelerator, compiler_fault
from sphinxkit.acceleration.quantization import QuantizedLinear, quantize
from sphinxkit.llama import LlamaModel

# float32 sums in another order; measured 1e-6 on logits of about 3
ATOL = 2e-5
YARN = {"type": "yarn", "factor": 2.0, "original_max_seq_len": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "both": {"qk_norm": True, "qkv_bias": True},
    "window": {"sliding_window": 5},
    "yarn": {"rope_scaling": YARN},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0, "original_max_seq_len": 8}},
}


def texts(model: LlamaModel) -> list[torch.Tensor]:
    """Logits of a batch of two prompts of different lengths and of six further tokens."""
    ids = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(1))
    cache = model.make_cache(2, 40)
    first = model.prefill(model.embed(ids), cache, [11, 7])
    return [first, *(model.decode(ids[:, step : step + 1], cache) for step in range(6))]


@pytest.mark.parametrize("name", OPTIONS)
def test_fused_layers_compute_what_the_modules_do(name: str, small_llama: Callable[..., LlamaModel]) -> None:
    model = small_llama(**OPTIONS[name]).eval()
    expected = texts(model)
    accelerate(model, "auto")
    assert obstacle(model) is None
    for one, other in zip(texts(model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
    assert isinstance(model.accelerator, FusedAccelerator)
    assert model.accelerator.current(model) is not None
    if model.qkv_bias:  # values that change in place are seen
        with torch.no_grad():
            model.layers[0].attention.k_proj.bias.add_(1.0)
            model.layers[0].attention.v_proj.bias.add_(1.0)
        changed = texts(model)
        model.accelerator = None
        for one, other in zip(changed, texts(model), strict=True):
            torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
        assert not torch.allclose(changed[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_keep_biases_and_norms(bits: int, small_llama: Callable[..., LlamaModel]) -> None:
    options = {"qk_norm": True, "qkv_bias": True, "embed_dim": 64, "head_dim": 32, "hidden_dim": 64}
    model = small_llama(**options).eval()
    quantize(model, bits, 32)
    assert isinstance(model.layers[0].attention.q_proj, QuantizedLinear)
    plain = texts(model)
    accelerate(model, "auto")
    for one, other in zip(texts(model), plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # 8 bits: the kernel's own rounding
    with torch.no_grad():
        model.accelerator = None
        before = texts(model)[0]
        model.layers[1].attention.v_proj.bias.add_(1.0)
        assert not torch.allclose(texts(model)[0], before, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("is_joined", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_steps_compute_what_the_modules_do(
    name: str, is_joined: bool, small_llama: Callable[..., LlamaModel]
) -> None:
    """Prefill of a ragged batch and further tokens, traced by torch.compile: joined layers, or the modules."""
    torch.compiler.reset()
    model = small_llama(**OPTIONS[name]).eval()
    expected = texts(model)
    beside = None if is_joined else model.layers[0].attention.q_proj.weight.data  # keeps it from being joined
    model.accelerator = CompiledAccelerator("eager")
    for one, other in zip(texts(model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
    assert model.accelerator.num_graphs > 0
    del beside


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "window"])
def test_code_that_was_made(name: str, small_llama: Callable[..., LlamaModel]) -> None:
    """The whole way through torch's compiler, as ``accelerate="compile"`` goes."""
    if (fault := compiler_fault(torch.device("cpu"))) is not None:
        pytest.skip(fault)
    torch.compiler.reset()
    model = small_llama(**OPTIONS[name]).eval()
    expected = texts(model)
    accelerate(model, "compile")
    for one, other in zip(texts(model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
