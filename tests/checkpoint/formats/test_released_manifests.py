"""Every name and shape of the full-size released checkpoints, both directions, for any number of shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sphinxkit.checkpoint import MappingSource
from sphinxkit.checkpoint.formats.meta import llm_from_meta, meta_from_numbers
from sphinxkit.checkpoint.formats.released import sphinx_key_map, vision_of_type
from sphinxkit.checkpoint.keymap import KeyMap
from sphinxkit.checkpoint.llm_config import full_numbers
from sphinxkit.checkpoint.sharding import merge_shards, shard_shape
from sphinxkit.recipe import Recipe, build
from sphinxkit.tensor_files.lazy import StoredTensor

# type -> the shipped recipe of the same model
RECIPES = {
    "llama_ens": "sphinx_13b",
    "llama_ens5": "sphinx_1k_13b",
    "llama_ens10": "sphinx_2k_13b",
    "llama_ens5p2": "sphinx_1k_pooled_13b",
    "llama_ens_light": "sphinx_tiny",
    "llama_ens5_light": "sphinx_tiny_1k",
}
UNUSED_COUNT = {"llama_ens_light": 1, "llama_ens5_light": 1}  # mask_token alone; with CLIP there are 7 more

Manifest = dict[str, tuple[tuple[int, ...], int | None]]


@pytest.fixture(params=RECIPES)
def llama_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifest(golden: Path, llama_type: str) -> Manifest:
    raw = json.loads((golden / "manifests" / f"{llama_type}.json").read_text())
    return {name: (tuple(shape), dim) for name, (shape, dim) in raw.items()}


@pytest.fixture
def key_map(llama_type: str) -> KeyMap:
    return sphinx_key_map(vision_of_type(llama_type, "test"))


def on_meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_every_name_has_its_place(manifest: Manifest, key_map: KeyMap, llama_type: str) -> None:
    unused = [name for name in manifest if key_map.is_unused(name)]
    assert len(unused) == UNUSED_COUNT.get(llama_type, 8)
    ours = {}
    for name, (_, dim) in manifest.items():
        if name in unused:
            continue
        found = key_map.to_ours(name)
        assert found is not None, name
        assert found[1].split_dim == dim, name
        ours[name] = found[0]
    assert len(set(ours.values())) == len(ours)
    for name, canonical in ours.items():
        back = key_map.to_theirs(canonical)
        assert back is not None
        assert back[0] == name


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_shards_of_any_number_merge_to_the_manifest(manifest: Manifest, key_map: KeyMap, count: int) -> None:
    shards = []
    for rank in range(count):
        shard = {}
        for name, (shape, dim) in manifest.items():
            part = torch.zeros(()).expand(shard_shape(shape, dim, count, name))
            shard[name] = StoredTensor(Path(f"{rank}.pth"), name, tuple(part.shape), part.dtype, lambda part=part: part)
        shards.append(shard)
    entries, unused = merge_shards(Path("model"), shards, key_map)
    assert len(entries) + len(unused) == len(manifest)
    for name, (shape, _) in manifest.items():
        found = key_map.to_ours(name)
        entry = unused[name] if found is None or name in unused else entries[found[0]]
        assert entry.shape == shape


def test_model_on_meta_has_exactly_these_tensors(
    golden: Path, manifest: Manifest, key_map: KeyMap, llama_type: str
) -> None:
    model = build(RECIPES[llama_type], device="meta")
    expected = {}
    for name, (shape, _) in manifest.items():
        found = key_map.to_ours(name)
        if not key_map.is_unused(name) and found is not None:
            expected[found[0]] = shape
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_full_size_files_without_encoders_json_are_the_shipped_recipe(
    golden: Path, manifest: Manifest, key_map: KeyMap, llama_type: str
) -> None:
    config = json.loads((golden / "manifests" / "index.json").read_text())[llama_type]["config"]
    rows = manifest["llma.tok_embeddings.weight"][0][0]
    llm = llm_from_meta(config, Path("config.json"), rows)
    inferred = Recipe(
        {"kind": "model", "vision": vision_of_type(llama_type, ""), "llm": llm, "conversation": "sphinx_v1"}
    ).resolved()
    shipped = Recipe.find(RECIPES[llama_type]).resolved()
    assert inferred["vision"] == shipped["vision"]
    assert inferred["conversation"] == shipped["conversation"]
    inferred_llm, shipped_llm = build_numbers(inferred["llm"]), build_numbers(shipped["llm"])
    assert inferred_llm == shipped_llm
    tensors = {}
    for name, (shape, _) in manifest.items():
        found = key_map.to_ours(name)
        if found is not None and found[0].startswith("llm."):
            tensors[found[0]] = on_meta(shape)
    written = meta_from_numbers(full_numbers(shipped["llm"], MappingSource(tensors)))
    assert llm_from_meta(written, Path("config.json"), rows) == llm


def build_numbers(llm: dict[str, object]) -> dict[str, object]:
    """The options that decide a language model, without the name and the rule they came by."""
    heads = llm["num_heads"]
    skipped = ("type", "multiple_of", "ffn_dim_multiplier", "num_kv_heads")
    numbers = {key: value for key, value in llm.items() if key not in skipped}
    return numbers | {"num_kv_heads": llm["num_kv_heads"] or heads}
