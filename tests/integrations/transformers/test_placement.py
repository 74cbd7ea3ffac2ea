"""Devices, dtypes and checkpointing as transformers' users choose them."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.transformers.conftest import Pair
from tests.integrations.transformers.test_model import read


@pytest.mark.integration
@pytest.mark.parametrize(
    "device_map", ["auto", "cpu", {"model.vision_tower": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}]
)
def test_device_map(pair: Pair, device_map: str | dict[str, str]) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForImageTextToText

    placed = AutoModelForImageTextToText.from_pretrained(pair.folder, device_map=device_map, dtype=torch.float32)
    assert "VisionTower" in placed._no_split_modules
    assert "LlamaDecoderLayer" in placed._no_split_modules
    with torch.no_grad():
        inputs = read(pair)
        assert torch.equal(placed(**inputs).logits, pair.theirs(**inputs).logits)


def test_sixteen_bit(pair: Pair) -> None:
    from transformers import AutoModelForImageTextToText

    half = AutoModelForImageTextToText.from_pretrained(pair.folder, dtype=torch.bfloat16)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        inputs = read(pair)
        found, expected = half(**inputs).logits.float(), pair.theirs(**inputs).logits
    assert (found - expected).norm() / expected.norm() < 0.05  # 8 bits of mantissa through all layers; measured 0.01


def test_gradient_checkpointing(pair: Pair) -> None:
    inputs = read(pair)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == pair.theirs.config.image_token_id, -100)
    gradients = []
    for is_on in (False, True):
        pair.theirs.zero_grad()
        pair.theirs.train()
        if is_on:
            old = "gradient_checkpointing_enable"  # renamed in 5.24
            getattr(pair.theirs, "activation_checkpointing_enable", getattr(pair.theirs, old))()
        pair.theirs(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append(pair.theirs.model.vision_tower.start_token.grad.clone())
    getattr(pair.theirs, "activation_checkpointing_disable", pair.theirs.gradient_checkpointing_disable)()
    pair.theirs.eval().zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].norm() > 0
