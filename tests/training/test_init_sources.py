"""``init_from``: lists of checkpoints, a source for each part, and a first stage from files in the public formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from transformers import (
    Blip2Config,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

import sphinxkit
from sphinxkit import Recipe, checkpoint, encoders, hub
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.hub import HubListing, HubPath
from sphinxkit.tensor_source import ModuleSource
from sphinxkit.training import TrainPlan, train
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.init_sources import open_init_sources

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "recipes" / "sphinx_micro.model"

CLIP = {"image_size": 28, "embed_dim": 8, "num_layers": 1, "num_heads": 2}
CONVNEXT = {"input_size": 64, "dims": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}
DINO = {"input_size": 28, "pretrain_image_size": 28, "embed_dim": 12, "num_layers": 1, "num_heads": 2}
QFORMER = {
    "image_size": 28, "vision_dim": 8, "vision_layers": 1, "vision_heads": 2, "vision_hidden_dim": 16, "embed_dim": 8,
    "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "num_query_tokens": 2,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "kind": "model",
    "vision": {
        "image_size": 28,
        "branches": [
            {"encoders": [{"type": "blip2_qformer", **QFORMER}], "projector": {"type": "linear", "norm": "layer"}},
            {
                "encoders": [
                    {"type": "clip_vit_large_patch14", **CLIP},
                    {"type": "convnext_xxlarge", **CONVNEXT},
                    {"type": "dinov2_vit_giant_patch14", **DINO},
                ],
                "mixer": {"type": "channel", "grid": [2, 2]},
                "projector": {"type": "linear", "norm": "layer"},
            },
        ],
    },
    "llm": {
        "type": "llama", "vocab_size": 512, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "hidden_dim": 32, "max_seq_len": 512,
    },
}  # fmt: skip


def llama(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    return folder


def blip2(folder: Path) -> Path:
    vision = Blip2VisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    qformer = Blip2QFormerConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=8
    )
    text = OPTConfig(
        hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=60, word_embed_proj_dim=8
    )
    parts = {"vision_config": vision.to_dict(), "qformer_config": qformer.to_dict(), "text_config": text.to_dict()}
    Blip2Model(Blip2Config(**parts, num_query_tokens=2)).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def convnext(folder: Path) -> Path:
    text = open_clip.CLIP(
        8,
        {"image_size": 28, "patch_size": 14, "width": 8, "layers": 1, "head_width": 4},
        {"context_length": 7, "vocab_size": 31, "width": 16, "heads": 2, "layers": 1},
    ).state_dict()
    trunk = encoders.create("convnext_xxlarge", **CONVNEXT).trunk.state_dict()
    state = {f"visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    state |= {name: tensor for name, tensor in text.items() if not name.startswith("visual.")}
    folder.mkdir()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder


def dinov2(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models in the formats that the shipped pre-training recipes name, saved by their own libraries."""
    folder = tmp_path_factory.mktemp("public")
    makers = {
        "llm": llama,
        "blip2_qformer": blip2,
        "clip_vit_large_patch14": clip,
        "convnext_xxlarge": convnext,
        "dinov2_vit_giant_patch14": dinov2,
    }
    torch.manual_seed(0)
    return {part: str(make(folder / part)) for part, make in makers.items()}


def opened(init_from: Any, model: dict[str, Any] = MODEL, folder: Path | None = None) -> Any:
    with ExitStack() as stack:
        found = open_init_sources(init_from, Recipe(model), folder, stack)
        names = [key for source in found.sources for key in source.keys()]  # noqa: SIM118
        return found, names


def test_every_part_from_its_public_source(public: dict[str, str]) -> None:
    found, names = opened(public)
    assert found.tokenizer_path == Path(public["llm"]) / "tokenizer.model"
    expected = sphinxkit.build(MODEL, device="meta").state_dict()
    assert {name for name in expected if name.startswith("llm.") or ".encoders." in name} == set(names)
    clip_options = found.recipe.document["vision"]["branches"][1]["encoders"][0]
    assert clip_options["activation"] == "gelu"  # came with the weights; the builder's default is quick_gelu


def test_a_stage_starts_from_public_weights_and_learns(
    public: dict[str, str], document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = tmp_path / "micro.yaml"
    model.write_text(yaml.safe_dump(MODEL))
    shipped = Recipe.find("pretrain_7b").document
    assert set(shipped["init_from"]) == set(public)  # the same parts, of full size
    data = document()["data"]
    for stream in data.values():
        stream["batch_size"] = 4
    overrides = {
        "model": str(model), **{f"init_from.{part}": source for part, source in public.items()}, "data": data,
        "output": str(tmp_path / "run"), "steps": 8, "lr": 2e-2, "device": "cpu", "dtype": "float32", "num_workers": 0,
        "pack_tokens": 256, "save_every": None, "activation_checkpointing": False, "max_tokens": None, "log_every": 1,
    }  # fmt: skip
    result = train("pretrain_7b", overrides=overrides)
    losses = [
        json.loads(line)["loss"] for line in (result.folder / "log.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    loaded = sphinxkit.load(result.folder / "model")
    recipe = yaml.safe_load((result.folder / "model" / "recipe.yaml").read_text())
    options = recipe["vision"]["branches"][1]["encoders"][0]
    assert (options["activation"], "weights" in options) == ("gelu", False)
    reference = CLIPVisionModel.from_pretrained(public["clip_vit_large_patch14"]).eval()
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = reference.post_layernorm(reference(pixel_values=pixels).last_hidden_state)
    found = loaded.vision.branches[1].encoders[0](pixels).tokens()  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # the export is in bfloat16


def test_lists_and_single_paths(public: dict[str, str], tmp_path: Path) -> None:
    written = sphinxkit.build(MODEL)
    checkpoint.save(tmp_path / "whole", ModuleSource(written), recipe_yaml=written.recipe_yaml)
    found, names = opened([public["llm"], "whole"], folder=tmp_path)
    assert len(found.sources) == 2
    assert found.tokenizer_path == Path(public["llm"]) / "tokenizer.model"
    assert set(names) == set(written.state_dict())
    assert opened(str(tmp_path / "whole"))[0].recipe.document == MODEL
    assert opened(None)[0].sources == ()


def test_parts_of_a_checkpoint(public: dict[str, str], tmp_path: Path) -> None:
    written = sphinxkit.build(MODEL)
    checkpoint.save(tmp_path / "whole", ModuleSource(written), recipe_yaml=written.recipe_yaml)
    whole = str(tmp_path / "whole")
    cases = {
        "llm": lambda name: name.startswith("llm."),
        "encoders": lambda name: ".encoders." in name,
        "projectors": lambda name: ".projector." in name,
        "image_delimiters": lambda name: name.endswith(("start_token", "end_token")),
    }
    for part, belongs in cases.items():
        assert set(opened({part: whole})[1]) == {name for name in written.state_dict() if belongs(name)}
    # a single encoder lies over all of them
    both = {"encoders": whole, "clip_vit_large_patch14": public["clip_vit_large_patch14"]}
    found, names = opened(both)
    assert names.count("vision.branches.1.encoders.0.trunk.conv1.weight") == 2
    assert "vision.branches.1.encoders.0.trunk.conv1.weight" in list(found.sources[-1].keys())


def test_encoders_by_what_the_model_says(public: dict[str, str]) -> None:
    model = json.loads(json.dumps(MODEL))
    for branch in model["vision"]["branches"]:
        for encoder in branch["encoders"]:
            encoder["weights"] = public[encoder["type"]]
    found, names = opened({"encoders": "pretrained"}, model)
    assert len(names) == sum(".encoders." in name for name in sphinxkit.build(MODEL, device="meta").state_dict())
    assert "weights" not in str(found.recipe.document)


def test_pretrained_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: HubPath, cache_dir: Path | None = None) -> HubListing:
        raise CheckpointError(f"{place.text}: asked for")

    monkeypatch.setattr(hub, "list_files", refuse)
    with pytest.raises(CheckpointError, match=r"encoders\[0\]: hf://Salesforce/blip2-opt-2.7b: asked for"):
        opened({"blip2_qformer": "pretrained"})


def test_timm_by_its_model(tmp_path: Path) -> None:
    options = {"model": "vit_tiny_patch16_224", "input_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = json.loads(json.dumps(MODEL))
    model["vision"]["branches"] = [{"encoders": [{"type": "timm", **options}]}]
    torch.save(encoders.create("timm", **options).trunk.state_dict(), tmp_path / "vit.pth")
    _, names = opened({"timm/vit_tiny_patch16_224": "vit.pth"}, model, tmp_path)
    assert names
    assert opened({"timm": "vit.pth"}, model, tmp_path)[1] == names


def test_parts_that_are_not_there(public: dict[str, str]) -> None:
    with pytest.raises(
        RecipeError, match=r"init_from.clip_vit_large: expected a part of the model: .*did you mean 'clip_"
    ):
        opened({"clip_vit_large": "x"})
    with pytest.raises(CheckpointError, match=r"init_from.projectors: .* holds nothing of it"):
        opened({"projectors": public["llm"]})
    with pytest.raises(CheckpointError, match=r"vision.branches\[1\].encoders\[0\]: .*is in no format that is known"):
        opened({"clip_vit_large_patch14": public["dinov2_vit_giant_patch14"]})


def test_random_frozen_encoders_stay_refused(public: dict[str, str], document: Callable[..., dict[str, Any]]) -> None:
    without = {part: source for part, source in public.items() if part != "convnext_xxlarge"}
    plan = TrainPlan(**document(model=MODEL, init_from=without, allow_random_encoders=False))
    with pytest.raises(TrainingError, match=r"no checkpoint holds weights for the frozen vision.branches.1.encoders.1"):
        train(plan)
