from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sphinxkit.llama import LlamaModel
from sphinxkit.recipe import build
from sphinxkit.training.flops import llm_flops, peak_flops, utilization, vision_flops

SIZES = {"vocab_size": 64, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 24}


def test_matrix_products_are_torchs_count() -> None:
    """Attention apart: the counter takes the whole square, a causal kernel needs half of it."""
    llm = LlamaModel(**SIZES, attention="eager")
    embeds = torch.randn(1, 10, 16)
    with FlopCounterMode(display=False) as counter:
        llm(embeds)
    square = 2 * 2 * 2 * 10 * 10 * 16  # layers, products, multiply-add, keys, queries, width
    forward = counter.get_total_flops() - square // 2
    assert llm_flops(llm, [10], 10) == 3 * forward
    assert llm_flops(llm, [10], 10, is_trained=False) == 2 * forward
    assert llm_flops(llm, [10, 10], 20) == 6 * forward


def test_vision_is_counted_without_being_computed(document) -> None:
    model = build(document()["model"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.vision(torch.zeros(1, 3, 28, 28))
    assert vision_flops(model) == counter.get_total_flops() > 0
    model.vision = None
    assert vision_flops(model) == 0.0


def test_utilisation() -> None:
    assert utilization(50.0, 2.0, 100.0, 5) == pytest.approx(0.05)
    assert utilization(50.0, 2.0, None) is None
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


@pytest.mark.slow
def test_the_arithmetic_of_the_encoder_cache() -> None:
    # what docs/training.md says of the features of frozen encoders on disk
    for recipe, megabytes, encoding, sample in (
        ("sphinx_13b", 1.76, 1.7, 39.4),
        ("sphinx_1k_13b", 8.8, 8.3, 137.8),
        ("sphinx_tiny", 2.4, 2.2, 4.9),
    ):
        model = build(recipe, device="meta", dtype=torch.bfloat16)
        assert model.vision is not None
        encoders = [encoder for branch in model.vision.branches for encoder in branch.encoders]
        tokens = [each.num_prefix_tokens + math.prod(each.grid_size) for each in encoders]
        views = 5 if recipe == "sphinx_1k_13b" else 1
        stored = views * sum(n * each.embed_dim * 2 for n, each in zip(tokens, encoders, strict=True))
        vision, length = vision_flops(model), model.vision.num_tokens + 200
        assert stored / 1e6 == pytest.approx(megabytes, abs=0.05)
        assert vision / 1e12 == pytest.approx(encoding, abs=0.05)
        assert (vision + llm_flops(model.llm, [length], 100)) / 1e12 == pytest.approx(sample, abs=0.05)
