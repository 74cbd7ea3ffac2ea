from __future__ import annotations

from pathlib import Path

import pytest

import sphinxkit
from sphinxkit.errors import RecipeError, ShapeError


def test_inspect_a_checkpoint(golden: Path) -> None:
    found = sphinxkit.inspect(golden / "llama_ens5")
    model = sphinxkit.load(golden / "llama_ens5")
    assert model.vision is not None
    assert found.num_parameters == sum(p.numel() for p in model.parameters()) > 0
    assert found.parts["llm"] == sum(p.numel() for p in model.llm.parameters())
    assert found.num_image_tokens == model.vision.num_tokens
    assert found.stored is not None
    assert found.stored.tensors["llm.norm.weight"] == (model.llm.embed_dim,)
    assert found.stored.dtypes == {"float32": len(found.stored.tensors)}
    assert "tensors" not in found.to_dict(tensors=False)
    assert found.to_dict()["format"] == "sphinx"


def test_inspect_a_recipe() -> None:
    found = sphinxkit.inspect("sphinx_micro")
    assert (found.name, found.stored, found.num_views, found.num_image_tokens) == ("sphinx_micro", None, 5, 1455)
    assert found.recipe["llm"]["type"] == "llama"
    assert "files" not in found.to_dict()
    with pytest.raises(RecipeError, match="expected kind model, got kind mix"):
        sphinxkit.inspect("mix_sphinx")


def test_check() -> None:
    found = sphinxkit.check("sphinx_micro")
    assert (found.kind, found.num_image_tokens) == ("model", 1455)
    assert found.num_parameters == sphinxkit.inspect("sphinx_micro").num_parameters
    mix = sphinxkit.check("mix_ties")
    assert (mix.kind, mix.num_parameters, mix.num_image_tokens) == ("mix", None, None)
    with pytest.raises(RecipeError, match="did you mean 'llama2_13b'"):
        sphinxkit.check({"kind": "model", "llm": "llama2_14b"})
    with pytest.raises(ShapeError, match="llm: .*num_heads"):
        sphinxkit.check({"kind": "model", "llm": {"type": "llama", "embed_dim": 30, "num_heads": 4, "num_layers": 1}})
