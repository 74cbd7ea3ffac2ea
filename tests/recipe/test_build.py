from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from sphinxkit.errors import RecipeError, ShapeError
from sphinxkit.recipe import Recipe, build
from sphinxkit.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def micro() -> dict[str, Any]:
    return Recipe.find("sphinx_micro").resolved() | {"tokenizer": None}


def changed(document: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A copy of the recipe with its vision part changed."""
    document = copy.deepcopy(document)
    document["vision"] |= options
    return document


def test_micro_builds_with_random_weights() -> None:
    model = build("sphinx_micro", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not model.training
    pixels = model.preprocess(Image.new("RGB", (64, 32), "red"))
    logits = model(torch.tensor([[1, 2, 3]]), pixels)
    assert logits.shape == (1, 3, model.llm.vocab_size)
    assert torch.isfinite(logits).all()


def test_widths_are_wired(micro: dict[str, Any]) -> None:
    model = build(micro, device="meta")
    assert model.vision is not None
    qformer, channel = model.vision.branches
    assert qformer.projector.proj.in_features == 32
    assert channel.projector.proj.in_features == 32 + 64 + 32
    assert {branch.projector.proj.out_features for branch in model.vision.branches} == {model.llm.embed_dim}


def test_text_only(micro: dict[str, Any]) -> None:
    model = build({"kind": "model", "llm": micro["llm"]})
    assert model.vision is None
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 512)


def test_several_encoders_need_a_mixer(micro: dict[str, Any]) -> None:
    branches = [copy.deepcopy(micro["vision"]["branches"][1]) | {"mixer": None}]
    with pytest.raises(RecipeError, match="3 encoders .* need a mixer"):
        build(changed(micro, branches=branches), device="meta")


def test_tiles_must_make_the_image(micro: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"its tiles make an image of 448x448, but vision.image_size is 500"):
        build(changed(micro, image_size=500), device="meta")


def test_tokenizer_size_is_checked(golden) -> None:
    tokenizer = Tokenizer(golden / "llama_ens" / "tokenizer.model")
    with pytest.raises(RecipeError, match=r"the tokenizer has 512 pieces, but llm.vocab_size is 32000"):
        build("sphinx_tiny", device="meta", tokenizer=tokenizer)


def test_only_models_are_built() -> None:
    with pytest.raises(RecipeError, match="expected kind model, got kind mix"):
        build({"kind": "mix", "models": ["a", "b"]})


def my_projector(in_dim: int, out_dim: int) -> torch.nn.Module:
    """What a third party might plug in by ``module:builder``."""
    return torch.nn.Sequential(torch.nn.Linear(in_dim, out_dim), torch.nn.GELU())


def test_a_third_partys_builder_by_path(micro: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("third_party_parts")
    module.my_projector = my_projector
    monkeypatch.setitem(sys.modules, "third_party_parts", module)
    branches = [copy.deepcopy(micro["vision"]["branches"][0]) | {"projector": "third_party_parts:my_projector"}]
    model = build(changed(micro, branches=branches))
    pixels = model.preprocess(Image.new("RGB", (64, 32), "red"))
    assert model.encode_images(pixels).shape == (1, 5 * 34, 64)


def test_parts_that_do_not_fit(micro: dict[str, Any]) -> None:
    branches = copy.deepcopy(micro["vision"]["branches"])
    branches[1]["encoders"] = [branches[0]["encoders"][0], branches[1]["encoders"][0]]
    model = build(changed(micro, branches=branches[1:]))
    with pytest.raises(ShapeError, match="has no patches"):
        model.encode_images(torch.zeros(1, 3, 448, 448))


def test_end_ids() -> None:
    document = {"kind": "model", "llm": {"type": "llama", "vocab_size": 512, "embed_dim": 8, "num_layers": 1}}
    document["llm"] |= {"num_heads": 2, "hidden_dim": 8}
    assert build(document).end_ids == ()
    assert build(document | {"end_ids": [2, 511]}).end_ids == (2, 511)
    with pytest.raises(RecipeError, match=r"end_ids: 512 is outside the vocabulary of 512"):
        build(document | {"end_ids": [2, 512]})
    with pytest.raises(RecipeError, match=r"end_ids\[1\]"):
        build(document | {"end_ids": [2, -1]})


def test_building_validates_a_recipe_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinxkit.recipe import recipe as module

    validated: list[Any] = []
    find_errors = module.find_errors
    monkeypatch.setattr(module, "find_errors", lambda *given: (validated.append(given), find_errors(*given))[1])
    model = build("sphinx_micro", device="meta")
    assert len(validated) == 1
    assert model.recipe_yaml is not None
    assert "kind: model" in model.recipe_yaml


def test_nothing_is_filled_on_meta() -> None:
    """Following an initialiser on meta imports torch._dynamo, which takes longer than to build a model."""
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        build("sphinx_micro", device="meta")
    assert not seen & {"normal_", "uniform_", "erfinv_", "fill_", "zero_", "clamp_"}
    assert "empty" in seen
