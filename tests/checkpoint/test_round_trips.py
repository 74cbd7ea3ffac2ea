"""Converting there and back is bitwise, whatever the format and the number of shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphinxkit import checkpoint
from sphinxkit.checkpoint import MappingSource

LLAMA_TYPES = ("llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Model = tuple[MappingSource, dict[str, Any]]


def shard_bytes(folder: Path) -> list[dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]]:
    found = []
    for path in sorted(folder.glob("consolidated.*.pth")):
        tensors = torch.load(path, weights_only=True)["model"]
        found.append(
            {
                name: (tuple(t.shape), t.dtype, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                for name, t in tensors.items()
            }
        )
    return found


@pytest.mark.parametrize("llama_type", LLAMA_TYPES)
def test_released_to_ours_and_back_is_bitwise(golden: Path, tmp_path: Path, llama_type: str) -> None:
    with checkpoint.open(golden / llama_type) as original:
        recipe = original.recipe
        checkpoint.save(
            tmp_path / "own",
            original,
            unused=original.unused,
            tokenizer=original.tokenizer_path,
            max_shard_bytes=200_000,
        )
    with checkpoint.open(tmp_path / "own", verify=True) as own:
        assert own.recipe == recipe
        assert len(own.files) > 2
        checkpoint.save(
            tmp_path / "back", own, format="sphinx", num_shards=2, unused=own.unused, tokenizer=own.tokenizer_path
        )
    assert shard_bytes(tmp_path / "back") == shard_bytes(golden / llama_type)
    with checkpoint.open(tmp_path / "back", verify=True) as back:
        assert back.recipe == recipe
        assert back.metadata["llama_type"] == llama_type
    original_tokenizer = (golden / llama_type / "tokenizer.model").read_bytes()
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == original_tokenizer


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_released_shards(golden: Path, tmp_path: Path, same: Callable[..., None], count: int) -> None:
    with checkpoint.open(golden / "llama_ens5") as original:
        checkpoint.save(tmp_path / "x", original, format="sphinx", num_shards=count, unused=original.unused)
        assert len(list((tmp_path / "x").glob("*.pth"))) == count
        with checkpoint.open(tmp_path / "x") as opened:
            same(opened, original)
            same(opened.unused, original.unused)
            assert opened.recipe == original.recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.lists(
        st.sampled_from([("sphinxkit", None), ("sphinx", 1), ("sphinx", 4), ("meta", 1), ("meta", 2), ("hf", None)]),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    max_shard_bytes=st.sampled_from([1, 9_000, 10**9]),
)
@pytest.mark.slow
def test_any_path_through_the_formats(
    tmp_path_factory: pytest.TempPathFactory,
    text_model: Model,
    same: Callable[..., None],
    path: list[tuple[str, int | None]],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    source, recipe = text_model
    cast = MappingSource({key: source.read(key).to(dtype) for key in source.keys()})  # noqa: SIM118
    folder = tmp_path_factory.mktemp("path")
    current = checkpoint.save(folder / "start", cast, recipe=recipe)
    for step, (format, num_shards) in enumerate(path):
        with checkpoint.open(current) as opened:
            current = checkpoint.save(
                folder / str(step), opened, format=format, num_shards=num_shards, max_shard_bytes=max_shard_bytes
            )
    with checkpoint.open(current) as opened:
        same(opened, cast)
        assert opened.recipe == recipe


def test_bits_that_are_no_numbers_survive(tmp_path: Path, text_model: Model) -> None:
    source, recipe = text_model
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, *[1.0] * 28])
    payload = odd.view(torch.int32)
    payload[0] ^= 0x123  # a NaN with something to say
    tensors = {key: source.read(key) for key in source.keys()} | {"llm.norm.weight": odd}  # noqa: SIM118
    for format in (name for name in checkpoint.formats.names() if name != "safetensors"):
        folder = checkpoint.save(tmp_path / format, MappingSource(tensors), format=format, recipe=recipe)
        with checkpoint.open(folder) as opened:
            assert torch.equal(opened.read("llm.norm.weight").view(torch.int32), payload)
