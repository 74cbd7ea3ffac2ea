from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sphinxkit import encoders, hub
from sphinxkit.encoders import weight_files
from sphinxkit.encoders.weight_files import choose_files, find_folder
from sphinxkit.errors import CheckpointError
from sphinxkit.hub import HubFile, HubListing, HubPath
from tests.encoders.stand_ins import NAME, TINY


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin"], ["model.safetensors"]),
        (["open_clip_pytorch_model.bin", "open_clip_model.safetensors"], ["open_clip_model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            ["model.safetensors.index.json"],
        ),
        (["config.json", "dinov2_vitg14_pretrain.pth"], ["dinov2_vitg14_pretrain.pth"]),
        (["a.safetensors", "b.pth"], ["a.safetensors"]),
        (["optimizer.pt", "x.pt", "training_args.bin"], ["x.pt"]),
        (["x.bin.index.json", "x-1.bin"], ["x.bin.index.json"]),
    ],
)
def test_which_files_of_a_folder(names: list[str], chosen: list[str]) -> None:
    assert choose_files(names, "folder") == chosen


def test_folders_without_or_with_too_many_files(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"folder: expected files of tensors \(.*\), found config.json, notes.txt"
    ):
        choose_files(["notes.txt", "config.json"], "folder")
    with pytest.raises(CheckpointError, match="found nothing"):
        choose_files([], "folder")
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        find_folder(tmp_path / "none" / "deeper")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"holds several files of tensors \(clip.pth, other.pth\); name one of them"
    ):
        encoders.create(NAME, weights=tmp_path, **TINY)
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match="other.pth and another file both hold 'visual.proj'; name one of clip.pth"
    ):
        encoders.create(NAME, weights=tmp_path, **TINY)


@pytest.mark.parametrize(
    "content", [{"weight_map": []}, {"weight_map": {"a": "../b.safetensors"}}, {"weight_map": {"a": 3}}]
)
def test_damaged_indexes(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has no weight_map of tensor names to names of files beside it"):
        encoders.create(NAME, weights=tmp_path, **TINY)


class FakeHub:
    """A repository of files in a folder; notes what is fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, list[tuple[HubPath, str]]()

    def list_files(self, place: HubPath, cache_dir: Path | None = None) -> HubListing:
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        below = [
            name for name in names if name == place.path or name.startswith(f"{place.path}/" if place.path else "")
        ]
        return HubListing({name: HubFile(name, 1, None) for name in below}, "mit", True)

    def fetch_file(self, place: HubPath, name: str, cache_dir: Path | None = None) -> Path:
        self.fetched.append((place, name))
        return self.folder / name


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub(tmp_path)
    monkeypatch.setattr(weight_files.hub, "list_files", found.list_files)
    monkeypatch.setattr(weight_files.hub, "fetch_file", found.fetch_file)
    return found


@pytest.mark.parametrize("path", ["", "/clip.pth", "/deep", "/deep/clip.pth"])
def test_from_the_hub_only_what_is_needed_comes(path: str, source: Path, fake_hub: FakeHub) -> None:
    for folder in (source.parent, source.parent / "deep"):
        folder.mkdir(exist_ok=True)
        (folder / "clip.pth").write_bytes(source.read_bytes())
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("")
    encoder = encoders.create(NAME, **TINY)
    report = encoders.load_weights(encoder, f"hf://org/repo@v1{path}")
    assert report.source == f"hf://org/repo@v1{path}"
    prefix = "deep/" if "deep" in path else ""
    assert [name for _, name in fake_hub.fetched] == [f"{prefix}config.json", f"{prefix}clip.pth"]
    assert {(place.repo, place.revision) for place, _ in fake_hub.fetched} == {("org/repo", "v1")}


def test_pretrained_is_where_the_encoders_facts_say(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "list_files", lambda place, cache_dir: asked.append(place) or HubListing({}, "", True))
    encoder = encoders.create("blip2_qformer", vision_layers=1, num_layers=1, vision_dim=16, vision_heads=2)
    with pytest.raises(CheckpointError, match=r"hf://Salesforce/blip2-opt-2.7b: expected files of tensors"):
        encoders.load_weights(encoder, "pretrained")
    assert asked == [HubPath("hf://Salesforce/blip2-opt-2.7b", "Salesforce/blip2-opt-2.7b")]


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        (NAME, {}, "hf://openai/clip-vit-large-patch14"),
        (NAME, {"image_size": 336}, "hf://openai/clip-vit-large-patch14-336"),
        (NAME, {"image_size": 448}, "hf://openai/clip-vit-large-patch14"),
        (
            NAME,
            {"patch_size": 32, "embed_dim": 768, "num_layers": 12, "num_heads": 12},
            "hf://openai/clip-vit-base-patch32",
        ),
        (
            NAME,
            {"embed_dim": 1664, "num_layers": 48, "num_heads": 16, "mlp_ratio": 4.9231},
            "hf://laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        ),
        (NAME, {"embed_dim": 512}, ""),
        ("convnext_xxlarge", {}, "hf://laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"),
        ("convnext_xxlarge", {"depths": [3, 3, 27, 3]}, ""),
        ("dinov2_vit_giant_patch14", {}, "hf://facebook/dinov2-giant"),
        (
            "dinov2_vit_giant_patch14",
            {"embed_dim": 384, "num_layers": 12, "num_heads": 6, "ffn": "mlp", "num_register_tokens": 4},
            "hf://facebook/dinov2-with-registers-small",
        ),
        ("dinov2_vit_giant_patch14", {"num_register_tokens": 1}, ""),
        ("blip2_qformer", {}, "hf://Salesforce/blip2-opt-2.7b"),
    ],
)
def test_where_published_weights_are(name: str, options: dict[str, Any], weights: str) -> None:
    with torch.device("meta"):
        assert encoders.create(name, **options).info.weights == weights
