"""SPHINX-MoE's released layout: full-size names and shapes, and the golden checkpoint there and back."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.checkpoint.formats.meta import unpack_experts
from sphinxkit.checkpoint.formats.released import sphinx_key_map, vision_of_type
from sphinxkit.checkpoint.sharding import merge_shards, shard_shape
from sphinxkit.checkpoint.writing import TensorInput, pieces_of
from sphinxkit.recipe import Recipe, build
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_source import MappingSource

RECIPES = {"mixtral_sparse_ens": "sphinx_moe", "mixtral_sparse_ens5": "sphinx_moe_1k"}
EXPERTS = 8
ZERO = torch.zeros(())
Shapes = dict[str, tuple[int, ...]]


def shard_of(manifest: dict[str, tuple[list[int], int | str | None]], count: int) -> Shapes:
    """What every one of ``count`` files holds: a slice of every expert, and slices or all of the rest."""
    found = {}
    for name, (shape, dim) in manifest.items():
        if dim == "moe_hidden":
            assert shape[0] % (EXPERTS * count) == 0
            found[name] = (shape[0] // count, shape[1])
        else:
            assert not isinstance(dim, str)
            found[name] = shard_shape(tuple(shape), dim, count, name)
    return found


@functools.cache
def full_size(llama_type: str) -> dict[str, torch.Tensor]:
    return build(RECIPES[llama_type], device="meta").state_dict()


@pytest.mark.parametrize(
    "count", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8]
)
@pytest.mark.parametrize("llama_type", RECIPES)
def test_full_size_names_and_shapes_both_ways(golden: Path, llama_type: str, count: int) -> None:
    manifest = json.loads((golden / "manifests" / f"{llama_type}.json").read_text())
    key_map = sphinx_key_map(vision_of_type(llama_type, ""))
    files = shard_of(manifest, count)
    shards = [
        {
            name: StoredTensor(Path(f"{rank}.pth"), name, shape, torch.float32, functools.partial(ZERO.expand, shape))
            for name, shape in files.items()
        }
        for rank in range(count)
    ]
    merged, unused = merge_shards(Path("model"), unpack_experts(shards), key_map)
    model = full_size(llama_type)
    assert {name: tensor.shape for name, tensor in merged.items()} == {k: tuple(v.shape) for k, v in model.items()}
    assert len(merged) + len(unused) == len(manifest)
    pieces = pieces_of(TensorInput(MappingSource(model), None, None, None), key_map, count)
    written = {piece.spec.name: piece.spec.shape for piece in pieces}
    assert written == {name: shape for name, shape in files.items() if name not in unused}


@pytest.mark.parametrize("llama_type", RECIPES)
def test_the_shipped_recipe_is_that_of_the_type(llama_type: str) -> None:
    shipped = Recipe.find(RECIPES[llama_type]).resolved()
    inferred = Recipe(
        {"kind": "model", "vision": vision_of_type(llama_type, ""), "llm": "mixtral_8x7b", "conversation": "sphinx_v1"}
    ).resolved()
    assert inferred["vision"] == shipped["vision"]
    assert shipped["llm"]["moe"].get("load_balancing_weight", 0.01) == (0.1 if llama_type.endswith("ens") else 0.01)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_golden_checkpoint_in_any_number_of_shards(golden: Path, tmp_path: Path, count: int) -> None:
    source = golden / "mixtral_sparse_ens5"
    folder = sphinxkit.convert(source, tmp_path / "out", format="sphinx", num_shards=count)
    with checkpoint.open(source) as before, checkpoint.open(folder) as after:
        assert list(before) == list(after)
        assert all(torch.equal(before.read(key), after.read(key)) for key in before)
        assert before.recipe == after.recipe
    if count == 2:  # as the public implementation wrote it
        for rank in range(2):
            name = f"consolidated.{rank:02}-of-02.model.pth"
            theirs, ours = (torch.load(path / name, weights_only=True)["model"] for path in (source, folder))
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_mix_is_one_of_its_models_at_the_ends(golden: Path, tmp_path: Path, beta: float) -> None:
    with checkpoint.open(golden / "mixtral_sparse_ens5") as opened:
        tensors = {key: opened.read(key) for key in opened}
        first, second = (
            checkpoint.save(
                tmp_path / name, MappingSource({k: t + shift for k, t in tensors.items()}), recipe=opened.recipe
            )
            for name, shift in (("first", 0.0), ("second", 0.01))
        )
    sphinxkit.mix([first, second], tmp_path / "mixed", beta=beta)
    with checkpoint.open(tmp_path / "mixed") as mixed, checkpoint.open(first) as a, checkpoint.open(second) as b:
        wanted = (a, b)
        bests = [all(torch.equal(mixed.read(key), each.read(key)) for key in a) for each in wanted]
        assert bests in ([True, False], [False, True])
        assert bests == ([True, False] if beta == 1.0 else [False, True])


@pytest.mark.parametrize(("experts", "per_token", "heads", "kv_heads", "shards"), [(4, 1, 4, 4, 4), (16, 3, 8, 2, 8)])
def test_text_only_models_of_other_sizes(
    tmp_path: Path, experts: int, per_token: int, heads: int, kv_heads: int, shards: int
) -> None:
    """As released files, from and to Hugging Face, and mixed with such a folder, which does not say what is default."""
    llm = {"vocab_size": 32, "embed_dim": 32, "num_layers": 1, "num_heads": heads, "num_kv_heads": kv_heads}
    moe = {"num_experts": experts, "num_experts_per_tok": per_token, "load_balancing_weight": 0.3}
    recipe = {
        "kind": "model",
        "conversation": "sphinx_v1",
        "llm": {"type": "llama", **llm, "hidden_dim": 24, "rope_theta": 5e5, "moe": moe},
    }
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        build(recipe).save(tmp_path / name)
    for format, options in (("sphinx", {"num_shards": shards}), ("meta", {"num_shards": shards}), ("hf", {})):
        folder = sphinxkit.convert(tmp_path / "second", tmp_path / format, format=format, **options)
        with checkpoint.open(tmp_path / "second") as before, checkpoint.open(folder) as after:
            assert set(after) == set(before)
            assert all(torch.equal(before.read(key), after.read(key)) for key in before)
            assert after.recipe["llm"]["moe"] == pytest.approx(moe)
            assert after.recipe["llm"]["rope_theta"] == 5e5
        for beta, wanted in ((0.0, "second"), (1.0, "first")):
            sphinxkit.mix([tmp_path / "first", folder], tmp_path / f"{format}{beta}", beta=beta)
            with checkpoint.open(tmp_path / wanted) as one, checkpoint.open(tmp_path / f"{format}{beta}") as mixed:
                assert all(torch.equal(one.read(key), mixed.read(key)) for key in one)


def test_hugging_face_there_and_back(golden: Path, tmp_path: Path) -> None:
    source = golden / "mixtral_sparse_ens5"
    folder = sphinxkit.convert(source, tmp_path / "hf", format="hf", part="llm")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mixtral"
    with checkpoint.open(source) as before, checkpoint.open(folder) as after:
        keys = [key for key in before if key.startswith("llm.")]
        assert set(after) == set(keys)
        assert all(torch.equal(before.read(key), after.read(key)) for key in keys)
