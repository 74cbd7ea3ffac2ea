from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sphinxkit
from sphinxkit import encoders
from sphinxkit.errors import DataError
from sphinxkit.recipe import Recipe, shipped_recipes
from sphinxkit.recipe.memory import FusedOperators, gpu_bytes, memory, peak_bytes

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
    peak = peak_bytes(module, (8, 100), torch.float32)
    # the input is given; 8 rows of 1000 and of 10 live together, views cost nothing
    assert peak == 8 * (1000 + 10) * FLOAT


def test_peak_counts_what_is_kept() -> None:
    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x + 1, x + 2, x + 3])

    assert peak_bytes(Kept(), (5, 7), torch.float32) == 6 * 5 * 7 * FLOAT


def test_attention_is_counted_without_its_matrix() -> None:
    short = memory("sphinx_micro", text_tokens=500, images=0)
    long = memory("sphinx_micro", text_tokens=2000, images=0)
    assert long.activations < 5 * short.activations  # linear in the length, not quadratic


def test_estimate_scales_with_rows_and_dtype() -> None:
    one = memory("sphinx_micro", text_tokens=100)
    four = memory("sphinx_micro", text_tokens=100, batch_size=4)
    half = memory("sphinx_micro", text_tokens=100, dtype=torch.bfloat16)
    assert one.num_image_tokens == 1455
    assert four.kv_cache == 4 * one.kv_cache
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01)
    assert four.weights == one.weights
    assert half.kv_cache * 2 == one.kv_cache
    assert sum(half.weights.values()) * 2 == sum(one.weights.values())
    assert one.total == sum(one.weights.values()) + one.kv_cache + one.activations


def test_experts_lie_in_memory_and_only_some_compute() -> None:
    numbers = {"vocab_size": 64, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 24}
    recipe = {"kind": "model", "llm": {"type": "llama", **numbers, "moe": {"num_experts": 6, "num_experts_per_tok": 2}}}
    found, said = memory(recipe, text_tokens=30, dtype=torch.bfloat16), sphinxkit.inspect(recipe)
    one = 2 * 3 * 16 * 24  # one expert of each layer
    assert found.experts == 2 * 6 * one
    assert found.weights["llm"] - found.active == 2 * 4 * one
    assert said.num_parameters - said.num_active_parameters == 4 * one
    dense = memory({"kind": "model", "llm": {"type": "llama", **numbers}}, text_tokens=30)
    assert (dense.experts, dense.active) == (0, dense.weights["llm"])


def live_peak(call: Callable[[], object]) -> int:
    """Torch's own accounting of the memory of a call."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_prediction_holds_on_a_real_pass() -> None:
    model = sphinxkit.build("sphinx_micro")
    embeds = torch.zeros(1, 300, model.llm.embed_dim)
    llm = sphinxkit.build("sphinx_micro", device="meta").llm
    predicted = peak_bytes(llm, (1, 300, 64), torch.float32, output_positions=slice(-1, None))
    peak = live_peak(lambda: model.llm(embeds, output_positions=slice(-1, None)))
    # the fused attention's own workspace is the difference
    assert 0.8 * predicted <= peak <= 1.3 * predicted


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_vit_large_patch14", {"embed_dim": 64, "num_heads": 4, "num_layers": 2}),
        ("dinov2_vit_giant_patch14", {"embed_dim": 64, "num_heads": 4, "num_layers": 2}),
        ("convnext_xxlarge", {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1)}),
    ],
)
def test_prediction_holds_for_encoders(name: str, options: dict[str, Any]) -> None:
    real = encoders.create(name, **options)
    with torch.device("meta"):
        meta = encoders.create(name, **options)
    predicted = peak_bytes(meta, (4, 3, 224, 224), torch.float32)
    pixels = torch.zeros(4, 3, 224, 224)
    peak = live_peak(lambda: real(pixels))
    assert 0.8 * predicted <= peak <= 1.3 * predicted  # kernels' own workspaces are the difference


def test_a_large_model_in_a_moment() -> None:
    """Eight rows and images of the released 13B model: nothing is computed and nothing loaded."""
    estimate = memory("sphinx_1k_13b", batch_size=8, dtype=torch.bfloat16)
    assert estimate.weights["llm"] == 2 * 13_015_864_320  # parameters of LLaMA-2 13B, arXiv:2307.09288
    slots = 1968  # 1455 image and 512 text tokens, rounded up by the cache
    assert estimate.kv_cache == 8 * slots * 40 * 2 * 5120 * 2  # rows, slots, layers, keys and values, width, bytes
    assert estimate.left_on("h100") == 80 * 10**9 - estimate.total > 0
    assert estimate.left_on("rtx4090") < 0


def test_gpus() -> None:
    assert gpu_bytes("h200") == 141 * 10**9
    with pytest.raises(DataError, match="GPU 'h1000' is not known; did you mean 'h100'"):
        gpu_bytes("h1000")
    with pytest.raises(DataError, match="GPU 'tpu' is not known.*(rtx4090|t4)"):
        gpu_bytes("tpu")


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
        memory("sphinx_micro", **options)


@pytest.mark.parametrize("shape", [(2, 3, 8), (3, 1), (8,), ()])
def test_shapes_of_fused_operators_are_torchs(shape: tuple[int, ...]) -> None:
    table = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="meta")
    other = torch.empty(shape, dtype=torch.float32, device="meta")
    image, weight = torch.empty(2, 4, 9, 7, device="meta"), torch.empty(6, 2, 3, 2, device="meta")
    tall = torch.empty(1, 3, 7, 5, device="meta")

    def results() -> list[torch.Tensor]:
        return [
            *(table * other, other + table, table - other, table / other, table**other, 2.0 * table, 1.0 / table),
            *(2.0**table, table // 3, F.silu(table), torch.sigmoid(table), F.rms_norm(table, (8,)), F.gelu(table)),
            *(torch.arange(2, 9, 3, device="meta"), torch.arange(5, device="meta", dtype=torch.float32)),
            *(torch.cat([table, table], dim=1), torch.cat([table, table, table], -1), torch.cat([table, table])),
            *(
                table.mean(dim=1, keepdim=True),
                table.mean(dim=-1),
                torch.polar(other, other),
                torch.full_like(other, 2),
            ),
            F.conv2d(image, weight, None, (2, 1), (1, 0), (1, 1), 2),
            F.conv2d(image, torch.empty(6, 4, 2, 2, device="meta"), stride=2),
            F.interpolate(tall, size=(9, 4), mode="nearest"),
            F.interpolate(tall, scale_factor=(1.5, 0.9), mode="bicubic"),
        ]

    expected = results()
    with FusedOperators():
        found = results()
    for ours, torchs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.is_meta) == (torchs.shape, torchs.dtype, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if Recipe.find(name).kind == "model"])
def test_every_shipped_model_is_counted_as_torch_follows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = sphinxkit.memory(name, dtype=torch.bfloat16, text_tokens=40)
    model = sphinxkit.build(name, device="meta", dtype=torch.bfloat16)
    tags = 0 if model.vision is None else 2 * 2 * model.llm.embed_dim  # start and end token, beside the parts
    assert sum(counted.weights.values()) == sum(p.numel() * p.element_size() for p in model.parameters()) - tags
    module = sys.modules["sphinxkit.recipe.memory"]
    monkeypatch.setattr(module, "_ELEMENTWISE", frozenset())
    monkeypatch.setattr(module, "_LIKE_THEIR_INPUT", (F.layer_norm, F.gelu, F.rms_norm))
    assert sphinxkit.memory(name, dtype=torch.bfloat16, text_tokens=40) == counted
