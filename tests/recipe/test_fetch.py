from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

import sphinxkit
from sphinxkit import Recipe, hub
from sphinxkit.cli import app
from sphinxkit.errors import CheckpointError
from sphinxkit.hub import HubFile, HubListing, HubPath
from sphinxkit.recipe.fetch import NeededFiles

BLIP2_INDEX = {
    "weight_map": {
        "query_tokens": "model-00002-of-00003.safetensors",
        "qformer.layernorm.weight": "model-00002-of-00003.safetensors",
        "vision_model.embeddings.class_embedding": "model-00001-of-00003.safetensors",
        "language_model.lm_head.weight": "model-00003-of-00003.safetensors",
    }
}
LLAMA_INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
# what the repositories hold, as far as it matters here: name -> content, or the size of a file of that many bytes
REPOSITORIES: dict[str, dict[str, Any]] = {
    "Salesforce/blip2-opt-2.7b": {
        "config.json": "{}", "model.safetensors.index.json": json.dumps(BLIP2_INDEX),
        "model-00001-of-00003.safetensors": 700, "model-00002-of-00003.safetensors": 300,
        "model-00003-of-00003.safetensors": 9000, "pytorch_model-00001-of-00002.bin": 9000, "README.md": "",
    },
    "openai/clip-vit-large-patch14": {
        "config.json": "{}", "model.safetensors": 50, "pytorch_model.bin": 50, "tf_model.h5": 50, "vocab.json": "{}",
    },
    "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup": {
        "open_clip_config.json": "{}", "open_clip_pytorch_model.bin": 60, "images/a.png": 5,
    },
    "facebook/dinov2-giant": {"config.json": "{}", "model.safetensors": 40, "pytorch_model.bin": 40},
    "meta-llama/Llama-2-7b-hf": {
        "config.json": "{}", "model.safetensors.index.json": json.dumps(LLAMA_INDEX), "tokenizer.model": 3,
        "model-00001-of-00002.safetensors": 500, "model-00002-of-00002.safetensors": 400,
        "pytorch_model-00001-of-00002.bin": 900, "tokenizer.json": "{}",
    },
}  # fmt: skip


class FakeHub:
    """Repositories, a cache, and whether there is a network."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.is_online, self.fetched = cache, True, list[str]()

    def _local(self, repo: str, name: str) -> Path | None:
        path = self.cache / repo / name
        return path if path.exists() else None

    def list_files(self, place: HubPath, cache_dir: Path | None = None) -> HubListing:
        files = {}
        for name, content in REPOSITORIES[place.repo].items():
            local = self._local(place.repo, name)
            size = content if isinstance(content, int) else len(content)
            if self.is_online or local is not None:
                files[name] = HubFile(name, size, local)
        if not files:
            raise CheckpointError(f"{place.text}: cannot be fetched and is not in the local cache")
        return HubListing(files, "mit" if self.is_online else "", self.is_online, place.repo.startswith("meta-llama"))

    def fetch_file(self, place: HubPath, name: str, cache_dir: Path | None = None) -> Path:
        local = self._local(place.repo, name)
        if local is not None:
            return local
        if not self.is_online:
            raise CheckpointError(f"{place.text} (file {name}): cannot be fetched")
        self.fetched.append(f"{place.repo}/{name}")
        path = self.cache / place.repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = REPOSITORIES[place.repo][name]
        path.write_text(content if isinstance(content, str) else "")
        return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(hub, "list_files", found.list_files)
    monkeypatch.setattr(hub, "fetch_file", found.fetch_file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


NEEDED = {
    "vision.branches[0].encoders[0]": [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ],
    "vision.branches[1].encoders[0]": ["config.json", "model.safetensors"],
    "vision.branches[1].encoders[1]": ["open_clip_config.json", "open_clip_pytorch_model.bin"],
    "vision.branches[1].encoders[2]": ["config.json", "model.safetensors"],
}
LLAMA = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
]


def names(needed: Sequence[NeededFiles]) -> dict[str, list[str]]:
    return {item.place: [file.name for file in item.files] for item in needed}


def test_only_what_a_model_needs(fake: FakeHub) -> None:
    told: list[Any] = []
    needed = sphinxkit.fetch("sphinx_7b", announce=lambda found: told.append((names(found), list(fake.fetched))))
    assert names(needed) == NEEDED
    assert all(file.local is not None for item in needed for file in item.files)
    before, fetched_before = told[0]
    assert before == NEEDED
    assert fetched_before == ["Salesforce/blip2-opt-2.7b/model.safetensors.index.json"]  # tells which files there are
    assert not any("00003-of-00003" in name or name.endswith(".h5") for name in fake.fetched)
    assert {item.license for item in needed} == {"mit"}
    blip2 = needed[0]
    assert blip2.num_bytes == 700 + 300 + len(json.dumps(BLIP2_INDEX)) + 2


def test_what_is_there_is_not_fetched_again(fake: FakeHub) -> None:
    sphinxkit.fetch("sphinx_tiny")
    (fake.cache / "facebook/dinov2-giant/model.safetensors").unlink()
    fake.fetched.clear()
    told: list[Sequence[NeededFiles]] = []
    sphinxkit.fetch("sphinx_tiny", announce=told.append)
    assert [file.name for item in told[0] for file in item.missing] == ["model.safetensors"]
    assert fake.fetched == ["facebook/dinov2-giant/model.safetensors"]


def test_a_stage_of_training(fake: FakeHub) -> None:
    needed = sphinxkit.fetch("pretrain_7b")
    assert names(needed) == {"init_from.llm": LLAMA, **NEEDED}
    assert needed[0].is_gated


@pytest.mark.parametrize(
    ("init_from", "places"),
    [
        ({"encoders": "pretrained"}, list(NEEDED)),
        ("hf://meta-llama/Llama-2-7b-hf", ["init_from"]),
        (["runs/other", "hf://meta-llama/Llama-2-7b-hf"], ["init_from"]),
        ({"llm": "runs/llm", "clip_vit_large_patch14": "clip.pth"}, []),
        (None, []),
    ],
)
def test_forms_of_init_from(init_from: Any, places: list[str], fake: FakeHub) -> None:
    document = {**Recipe.find("pretrain_7b").document, "init_from": init_from}
    assert list(names(sphinxkit.fetch(document))) == places


def test_a_mix_and_recipes_without_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    mix = {"kind": "mix", "models": ["hf://meta-llama/Llama-2-7b-hf", "runs/other"], "beta": 0.5}
    assert names(sphinxkit.fetch(mix)) == {"models": LLAMA}
    assert sphinxkit.fetch("sphinx_micro") == []
    assert sphinxkit.fetch("mixture_pretrain") == []


def test_without_a_network_everything_that_is_missing_is_one_list(fake: FakeHub) -> None:
    sphinxkit.fetch("pretrain_7b")
    fake.is_online = False
    assert names(sphinxkit.fetch("pretrain_7b")) == {"init_from.llm": LLAMA, **NEEDED}
    (fake.cache / "meta-llama/Llama-2-7b-hf/model-00002-of-00002.safetensors").unlink()
    (fake.cache / "Salesforce/blip2-opt-2.7b/model-00001-of-00003.safetensors").unlink()
    shutil.rmtree(fake.cache / "facebook")
    with pytest.raises(CheckpointError) as caught:
        sphinxkit.fetch("pretrain_7b")
    text = str(caught.value)
    assert text.startswith("the hub cannot be reached, and the cache lacks:")
    assert "init_from.llm: hf://meta-llama/Llama-2-7b-hf: model-00002-of-00002.safetensors" in text
    assert "encoders[0]: hf://Salesforce/blip2-opt-2.7b: model-00001-of-00003.safetensors" in text
    assert "encoders[2]: hf://facebook/dinov2-giant: cannot be fetched" in text
    assert "openai" not in text


def test_offline_mode_and_an_empty_cache(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.is_online = False
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        sphinxkit.fetch("sphinx_tiny", to=tmp_path / "empty")
    first = "vision.branches[0].encoders[0]: hf://laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"
    assert str(caught.value).splitlines() == [
        "the hub cannot be reached, and the cache lacks:",
        f"  - {first}: nothing of it",
        "  - vision.branches[0].encoders[1]: hf://facebook/dinov2-giant: nothing of it",
    ]


def test_a_repository_without_weights(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPOSITORIES, "org/empty", {"config.json": "{}"})
    document = {**Recipe.find("pretrain_7b").document, "init_from": "hf://org/empty"}
    with pytest.raises(CheckpointError, match="init_from: hf://org/empty: no weights in it"):
        sphinxkit.fetch(document)


def test_a_disk_that_is_too_small(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match=r"0.0 GB to download, the disk has 0.0 GB free"):
        sphinxkit.fetch("sphinx_tiny", to=tmp_path / "not" / "there")
    assert fake.fetched == []


def test_a_language_models_numbers_alone(fake: FakeHub) -> None:
    document = {"kind": "model", "llm": {"type": "from_config", "path": "hf://meta-llama/Llama-2-7b-hf"}}
    expected = {"llm": ["config.json", "tokenizer.model", "tokenizer.json"]}
    assert names(sphinxkit.fetch(document)) == expected
    assert len(fake.fetched) == 3
    stage = {**Recipe.find("pretrain_7b").document, "model": document, "init_from": None}
    assert names(sphinxkit.fetch(stage)) == expected


def test_a_whole_checkpoint(fake: FakeHub) -> None:
    assert names(sphinxkit.fetch("hf://meta-llama/Llama-2-7b-hf")) == {"checkpoint": LLAMA}


def test_the_command(fake: FakeHub, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fetch", "pretrain_7b", "--to", str(tmp_path / "other")])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(
        "init_from.llm: hf://meta-llama/Llama-2-7b-hf: 6 files, 0.00 GB, 0.00 GB to download (mit, "
    )
    assert "accept it at https://huggingface.co/meta-llama/Llama-2-7b-hf" in lines[0]
    assert lines[-1] == f"done; use it with HF_HUB_CACHE={tmp_path / 'other'}"
    result = CliRunner().invoke(app, ["fetch", "sphinx_micro"])
    assert result.output == "nothing to fetch: the recipe names nothing on the hub\n"
