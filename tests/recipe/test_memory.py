from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.errors import DataError
from sphinxkit.recipe.memory import _peak_bytes, estimate_memory

FLOAT = 4  # bytes


class Chain(nn.Module):
    """100 -> 1000 -> 10 -> 500: at most the 1000 and what goes into or comes out of it live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(100, 1000), nn.Linear(1000, 10), nn.Linear(10, 500)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_peak_of_a_chain_by_hand() -> None:
    with torch.device("meta"):
        module = Chain()
    peak = _peak_bytes(module, ((8, 100), torch.float32))
    # the input is given; 8 rows of 1000 and of 10 live together, views cost nothing
    assert peak == 8 * (1000 + 10) * FLOAT


def test_peak_counts_what_is_kept() -> None:
    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x + 1, x + 2, x + 3])

    assert _peak_bytes(Kept(), ((5, 7), torch.float32)) == 6 * 5 * 7 * FLOAT


def test_attention_is_counted_without_its_matrix() -> None:
    short = estimate_memory("sphinx_micro", text_tokens=500, images=0)
    long = estimate_memory("sphinx_micro", text_tokens=2000, images=0)
    assert long.activations < 5 * short.activations  # linear in the length, not quadratic


def test_estimate_scales_with_rows_and_dtype() -> None:
    one = estimate_memory("sphinx_micro", text_tokens=100)
    four = estimate_memory("sphinx_micro", text_tokens=100, batch_size=4)
    half = estimate_memory("sphinx_micro", text_tokens=100, dtype=torch.bfloat16)
    assert one.num_image_tokens == 1455
    assert four.kv_cache == 4 * one.kv_cache
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01)
    assert four.weights == one.weights
    assert half.kv_cache * 2 == one.kv_cache
    assert sum(half.weights.values()) * 2 == sum(one.weights.values())
    assert one.total == sum(one.weights.values()) + one.kv_cache + one.activations


def test_prediction_holds_on_a_real_pass() -> None:
    """Torch's own accounting of a real forward pass agrees with the prediction."""
    import sphinxkit

    model = sphinxkit.build("sphinx_micro")
    embeds = torch.zeros(1, 300, model.llm.embed_dim)
    predicted = _peak_bytes(
        sphinxkit.build("sphinx_micro", device="meta").llm,
        ((1, 300, 64), torch.float32),
        output_positions=slice(-1, None),
    )
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model.llm(embeds, output_positions=slice(-1, None))
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    # the fused attention's own workspace is the difference
    assert 0.8 * predicted <= peak <= 1.3 * predicted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_tokens": 4000}, "is longer than the context of 4096"),
        ({"images": 2}, "cannot answer 1 rows of 512 tokens with 2 images"),
        ({"batch_size": 0}, "cannot answer 0 rows"),
    ],
)
def test_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        estimate_memory("sphinx_micro", **options)
