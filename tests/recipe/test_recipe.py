from __future__ import annotations

import json
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
    "sphinx_moe": 291,
    "sphinx_moe_1k": 1455,
    "sphinx_micro": 1455,
    "nano/model": 71,
    "nano/model_subimages": 355,
}


def errors_of(document: object) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe(document)  # type: ignore[arg-type]
    return str(caught.value)


def models() -> list[str]:
    return [name for name in shipped_recipes() if Recipe.find(name).kind == "model"]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert Recipe.find(name).name == name.rpartition("/")[2]


def test_every_shipped_model_has_its_image_tokens() -> None:
    assert set(IMAGE_TOKENS) == set(models())


@pytest.mark.parametrize("name", sorted(IMAGE_TOKENS))
def test_shipped_models_build_on_meta(name: str) -> None:
    model = build(name, device="meta", dtype=torch.bfloat16)
    assert model.vision is not None
    assert model.vision.num_tokens == IMAGE_TOKENS[name]
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "sphinx_1k_13b" else pytest.mark.slow) for n in sorted(IMAGE_TOKENS)]
)
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
    message = errors_of(
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
        "visoin: unknown key; known: ",  # vision is there already
    ):
        assert expected in message
    assert message.count("\n  ") == 8
    assert "8 errors" in message


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
            r"vision.branches\[0\].encoders\[0\].tile_size: expected a positive int, got '8'",
        ),
    ],
)
def test_errors(document: object, message: str) -> None:
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
    with pytest.raises(RecipeError, match="expected a single document"):
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


@pytest.mark.parametrize("odd", ["!!set {a}", "!!binary Ynl0ZXM=", "2020-02-02"])
def test_values_are_text_numbers_lists_and_mappings(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(f"kind: model\nllm: tinyllama_1b\nconversation: {odd}\n")
    with pytest.raises(RecipeError, match="conversation: expected text, a number, a list or a mapping, got"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    "odd", [r'tokenizer: "a\0"', r'tokenizer: "\uD800"', r'"tokenizer\0": a', r'{"tokenizer": ["\0"]}']
)
def test_text_that_names_no_file(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(odd if odd.startswith("{") else f"kind: model\nllm: tinyllama_1b\n{odd}\n")
    with pytest.raises(RecipeError, match="expected text without NUL and half characters, got"):
        Recipe.from_yaml(path)


def test_a_message_lists_fifty_errors_and_shows_the_beginning_of_values() -> None:
    with pytest.raises(RecipeError, match=r"(?s)has 1001 errors.*and 951 more") as caught:
        Recipe({"kind": "model", "llm": "tinyllama_1b", "tokenizer": ["x" * 5000], "end_ids": ["x"] * 1000})
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("width", [384 * 10**9, 10**40])
def test_a_width_beyond_torchs_counting_is_named(width: int) -> None:
    with pytest.raises(RecipeError, match="llm: a tensor has more elements than torch can count"):
        sphinxkit.build(
            {
                "kind": "model",
                "llm": {"type": "llama", "embed_dim": width, "num_heads": 1, "num_layers": 1, "vocab_size": width},
            },
            device="meta",
        )


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


def test_a_checkpoints_recipe_may_not_name_code(tmp_path: Path) -> None:
    import yaml

    model = build({"kind": "model", "llm": TINY_LLM})
    model.save(tmp_path / "saved")
    path = tmp_path / "saved" / "recipe.yaml"
    document = yaml.safe_load(path.read_text())
    document["conversation"] = {"type": "os:system", "command": f"touch {tmp_path / 'pwned'}"}
    path.write_text(yaml.safe_dump(document))
    index = tmp_path / "saved" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]["files"]["recipe.yaml"]  # its checksum, which would give the change away
    index.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="conversation.type: names code to import, 'os:system', and comes with"):
        sphinxkit.load(tmp_path / "saved")
    assert not (tmp_path / "pwned").exists()


def my_llm(vocab_size: int = 8) -> torch.nn.Module:
    from sphinxkit.llama import llama

    return llama(vocab_size=vocab_size, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=8)


def test_code_that_this_process_uses_anyway_may_be_named_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("third_party_llm")
    module.my_llm = my_llm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "third_party_llm", module)
    build({"kind": "model", "llm": "third_party_llm:my_llm"}).save(tmp_path / "saved")
    assert sphinxkit.load(tmp_path / "saved").llm.vocab_size == 8


def test_a_checkpoints_recipe_is_a_model() -> None:
    with pytest.raises(RecipeError, match="a checkpoint's recipe is of kind model, got 'mix'"):
        Recipe({"kind": "mix", "models": ["a", "b"]}, trusted=False)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"branches": [{"encoders": "blip2_qformer"}]}, r"branches\[0\].encoders: "),
        (
            {"branches": [{"encoders": ["blip2_qformer"], "mixer": "sequence"}]},
            r"branches\[0\].mixer: 'sequence' cannot stand here: it takes no embed_dims",
        ),
        (
            {"branches": [{"encoders": [{"type": "convnext_xxlarge", "tile_size": 0}]}]},
            r"encoders\[0\].tile_size: expected a positive int, got 0",
        ),
    ],
)
def test_misplaced_parts(vision: dict, message: str) -> None:
    text = errors_of({"kind": "model", "llm": TINY_LLM, "vision": {"image_size": 8} | vision})
    assert "1 error:" in text
    import re

    assert re.search(message, text)


def test_what_only_building_finds_is_told_with_its_place() -> None:
    with pytest.raises(RecipeError, match="llm: unknown attention backend 'flash'"):
        build({"kind": "model", "llm": TINY_LLM | {"attention": "flash"}}, device="meta")
    with pytest.raises(sphinxkit.errors.ShapeError, match="llm: LLaMA: embed_dim 8 cannot be divided"):
        build({"kind": "model", "llm": TINY_LLM | {"num_heads": 3}}, device="meta")
    encoders = [{"type": "timm", "model": "resnet_18"}]
    document = {"kind": "model", "llm": TINY_LLM, "vision": {"image_size": 8, "branches": [{"encoders": encoders}]}}
    with pytest.raises(RecipeError, match=r"vision.branches\[0\].encoders\[0\]: .*resnet_18"):
        build(document, device="meta")
    with pytest.raises(RecipeError, match="llm: the builder gave Fraction, expected a torch.nn.Module"):
        build({"kind": "model", "llm": "fractions:Fraction"}, device="meta")
    with pytest.raises(RecipeError, match="'builtins:dict' has no signature"):
        build({"kind": "model", "llm": "builtins:dict"}, device="meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device: expected cpu, cuda, cuda:N or meta, got 'gpu'"),
        ({"dtype": "bfloat17"}, "floating torch dtype such as torch.bfloat16 or its name, got 'bfloat17'"),
        ({"dtype": "int8"}, "dtype: expected a floating torch dtype"),
        ({"dtype": "nn"}, "dtype: expected a floating torch dtype"),
        ({"dtype": torch.int8}, "dtype: expected a floating torch dtype"),
    ],
)
def test_bad_places(arguments: dict, message: str) -> None:
    with pytest.raises(sphinxkit.errors.DataError, match=message):
        build("sphinx_micro", **arguments)


def test_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(sphinxkit.errors.DataError, match="this machine has no CUDA device"):
        build("sphinx_micro", device="cuda")


def test_not_a_recipe() -> None:
    with pytest.raises(RecipeError, match="a recipe is a shipped name, a path, a dict or a Recipe, got NoneType"):
        build(None)  # type: ignore[arg-type]


def test_keys_are_names(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("kind: model\n? [a, b]\n: c\n")
    with pytest.raises(RecipeError, match="line 2: key .* is not a name"):
        Recipe.from_yaml(path)
