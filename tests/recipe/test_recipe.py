from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe, build, shipped_recipes

TINY_LLM = {"type": "llama", "vocab_size": 8, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}

# Source: section 4 of the reference numbers; the public implementation's image_words.
IMAGE_TOKENS = {
    "sphinx_13b": 291,
    "sphinx_7b": 291,
    "sphinx_1k_13b": 1455,
    "sphinx_1k_7b": 1455,
    "sphinx_2k_13b": 2910,
    "sphinx_2k_7b": 2910,
    "sphinx_1k_pooled_13b": 687,
    "sphinx_1k_pooled_7b": 687,
    "sphinx_tiny": 259,
    "sphinx_tiny_1k": 1295,
    "sphinx_micro": 1455,
}


def faults(document: object) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe(document)  # type: ignore[arg-type]
    return str(caught.value)


def models() -> list[str]:
    return [name for name in shipped_recipes() if Recipe.find(name).kind == "model"]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert Recipe.find(name).name == name


def test_every_shipped_model_has_its_image_tokens() -> None:
    assert set(IMAGE_TOKENS) == set(models())


@pytest.mark.parametrize("name", sorted(IMAGE_TOKENS))
def test_shipped_models_build_on_meta(name: str) -> None:
    model = build(name, device="meta", dtype=torch.bfloat16)
    assert model.vision is not None
    assert model.vision.num_tokens == IMAGE_TOKENS[name]
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(IMAGE_TOKENS))
def test_a_resolved_recipe_says_the_same(name: str) -> None:
    recipe = Recipe.find(name)
    resolved = Recipe(recipe.resolved())
    assert resolved.resolved() == resolved.document
    shapes = [
        {key: tensor.shape for key, tensor in build(each, device="meta").state_dict().items()}
        for each in (recipe, Recipe(recipe.resolved() | {"tokenizer": None}))
    ]
    assert shapes[0] == shapes[1]


def test_all_faults_come_at_once_with_path_and_suggestion() -> None:
    message = faults(
        {
            "kind": "model",
            "vision": {
                "image_size": "448",
                "branches": [
                    {
                        "encoders": ["clip_vit_large_patch41", {"type": "convnext_xxlarge", "input_sise": 512}],
                        "mixer": {"type": "channel", "embed_dims": [1, 2]},
                        "projector": {"type": "linear", "norm": 3},
                    }
                ],
            },
            "llm": {"type": "llama2_13b", "attention": "sdpa", "layers": 3},
            "conversation": "sphinx_v2",
            "visoin": 1,
        }
    )
    for expected in (
        "vision.image_size: ",
        "vision.branches[0].encoders[0]: unknown encoder 'clip_vit_large_patch41'; did you mean "
        "'clip_vit_large_patch14'?",
        "vision.branches[0].encoders[1].input_sise: unknown key; did you mean 'input_size'?",
        "vision.branches[0].mixer.embed_dims: is wired by assembly and cannot be written",
        "vision.branches[0].projector.norm: ",
        "llm.layers: unknown key",
        "conversation: unknown conversation 'sphinx_v2'; did you mean 'sphinx_v1'?",
        "visoin: unknown key; did you mean 'vision'?",
    ):
        assert expected in message
    assert message.count("\n  ") == 8
    assert "8 faults" in message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "a recipe is a mapping, got list"),
        ({}, "kind: expected one of model"),
        ({"kind": "modle"}, "did you mean 'model'"),
        ({"kind": "model"}, "llm: required key is missing"),
        ({"kind": "model", "llm": 3}, "llm: "),
        ({"kind": "model", "llm": {"embed_dim": 3}}, "a component is a name, or a mapping with `type: name`"),
        ({"kind": "model", "llm": {"type": "nowhere.module:builder"}}, "llm.type: .*cannot be imported"),
        ({"kind": "model", "llm": TINY_LLM | {"num_heads": "2"}}, "llm.num_heads: .*valid integer, got '2'"),
        ({"kind": "model", "llm": TINY_LLM | {"num_heads": True}}, "llm.num_heads: .*valid integer, got True"),
        (
            {"kind": "model", "llm": TINY_LLM, "vision": {"image_size": 8, "branches": []}},
            "vision.branches: .*at least 1 item",
        ),
        (
            {
                "kind": "model",
                "llm": TINY_LLM,
                "vision": {
                    "image_size": 8,
                    "branches": [{"encoders": [{"type": "convnext_xxlarge", "tile_size": "8"}]}],
                },
            },
            r"vision.branches\[0\].encoders\[0\].tile_size: expected int, got '8'",
        ),
    ],
)
def test_faults(document: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(document)  # type: ignore[arg-type]


def test_an_integer_may_stand_for_a_float_and_a_list_for_a_tuple() -> None:
    Recipe({"kind": "model", "llm": TINY_LLM | {"rope_theta": 10000}})


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(RecipeError, match=r"mine.yaml cannot be read"):
        Recipe.from_yaml(path)
    path.write_text("kind: [")
    with pytest.raises(RecipeError, match=r"mine.yaml is not YAML"):
        Recipe.from_yaml(path)
    path.write_text("kind: model\nllm: a\nllm: b\n")
    with pytest.raises(RecipeError, match="line 3: key 'llm' is written twice"):
        Recipe.from_yaml(path)
    path.write_text("kind: model\n---\nkind: model\n")
    with pytest.raises(RecipeError, match="expected one document, got 2"):
        Recipe.from_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(path)
    path.write_text("kind: model\nllm: tinyllama_1b\nconversation: {type: sphinx_v1, system: Be brief.}\n")
    recipe = Recipe.from_yaml(path)
    assert Recipe.find(str(path)).document == recipe.document
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(again).document == recipe.document


def test_unknown_name() -> None:
    with pytest.raises(RecipeError, match="no recipe 'sphinx_1k_13'.*did you mean 'sphinx_1k_13b'"):
        Recipe.find("sphinx_1k_13")


def test_lazy_names() -> None:
    assert sphinxkit.Recipe is Recipe
    assert sphinxkit.build is build
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sphinxkit.nothing


@pytest.mark.slow
def test_recipes_are_shipped_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    code = (
        "import sphinxkit, torch; m = sphinxkit.build('sphinx_13b', device='meta', dtype=torch.bfloat16); "
        "print(sphinxkit.__file__, m.vision.num_tokens); print(sphinxkit.build('sphinx_micro').tokenizer.vocab_size)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split()[0].startswith(str(site))
    assert result.stdout.split()[1:] == ["291", "512"]
