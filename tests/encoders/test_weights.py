"""Sources, detection, errors and memory of ``load_weights``; the formats have files of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sphinxkit import encoders, hub
from sphinxkit.encoders import Encoder, weight_files
from sphinxkit.encoders.weight_files import choose_files, find_folder
from sphinxkit.errors import CheckpointError, RegistryError
from sphinxkit.hub import HubFile, HubListing, HubPath
from sphinxkit.tensor_source import TensorSource

TINY: dict[str, Any] = {"image_size": 28, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
NAME = "clip_vit_large_patch14"


def open_clip_state(encoder: Encoder) -> dict[str, Tensor]:
    """An encoder's tensors as an open_clip file has them, with a text tower."""
    state = {name.replace("trunk.", "visual."): tensor for name, tensor in encoder.state_dict().items()}
    return {
        **state,
        "visual.proj": torch.zeros(16, 4),
        "logit_scale": torch.zeros(()),
        "ln_final.weight": torch.ones(4),
    }


@pytest.fixture
def source(tmp_path: Path, randomize: Callable[..., nn.Module]) -> Path:
    """A file in open_clip's format."""
    path = tmp_path / "clip.pth"
    torch.save(open_clip_state(randomize(encoders.create(NAME, **TINY), seed=5)), path)
    return path


def test_without_weights_it_stays_random() -> None:
    torch.manual_seed(0)
    plain = encoders.create(NAME, **TINY)
    torch.manual_seed(0)
    other = encoders.create(NAME, weights=None, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_names_and_options_are_checked_before_any_file() -> None:
    with pytest.raises(RegistryError, match="unknown encoder 'clip_vit'"):
        encoders.create("clip_vit", weights="/nowhere")
    with pytest.raises(RegistryError, match="unexpected keyword argument 'image_sise'"):
        encoders.create(NAME, weights="/nowhere", image_sise=3)


def test_parameters_keep_their_place_dtype_and_freezing(source: Path) -> None:
    encoder = encoders.create(NAME, **TINY).bfloat16()
    before = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in encoder.named_parameters()}
    encoders.load_weights(encoder, source)
    after = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in encoder.named_parameters()}
    assert after == before
    expected = torch.load(source, weights_only=True)["visual.conv1.weight"]
    assert torch.equal(encoder.state_dict()["trunk.conv1.weight"], expected.bfloat16())
    trainable = encoders.create(NAME, weights=source, trainable=True, **TINY)
    assert all(parameter.requires_grad for parameter in trainable.parameters())


def test_our_own_state_dict(tmp_path: Path, randomize: Callable[..., nn.Module]) -> None:
    given = randomize(encoders.create(NAME, **TINY))
    save_file(given.state_dict(), tmp_path / "encoder.safetensors")
    encoder = encoders.create(NAME, **TINY)
    assert encoders.load_weights(encoder, tmp_path).format == "sphinxkit"
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), given.parameters(), strict=True))


def test_somebody_elses_encoder_reads_its_own_names(tmp_path: Path) -> None:
    class Theirs(Encoder):
        pass

    def build() -> Theirs:
        trunk = nn.Linear(3, 4)
        return Theirs(
            trunk, name="theirs", embed_dim=4, num_prefix_tokens=1, grid_size=(0, 0), info=encoders.EncoderInfo()
        )

    given = build()
    torch.save(given.state_dict(), tmp_path / "theirs.pt")
    encoder = build()
    encoders.load_weights(encoder, tmp_path / "theirs.pt")
    assert torch.equal(encoder.trunk.weight, given.trunk.weight)
    with pytest.raises(CheckpointError, match="encoder theirs: no published weights are known for it"):
        encoders.load_weights(encoder, "pretrained")


def test_everything_that_does_not_fit_is_one_error_and_nothing_changes(source: Path) -> None:
    state = torch.load(source, weights_only=True)
    state["visual.conv1.weight"] = torch.zeros(16, 3, 7, 7)
    del state["visual.ln_post.bias"]
    state["visual.attn_pool.query"] = torch.zeros(4)
    state["strange"] = torch.zeros(1)
    torch.save(state, source)
    encoder = encoders.create(NAME, **TINY)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        encoders.load_weights(encoder, source)
    text = str(caught.value)
    assert text.startswith(
        f"{source} (open_clip) does not fit encoder {NAME} (the files are of image_size=14, patch_size=7"
    )
    for line in (
        "'strange' is not known to this format",
        "'trunk.conv1.weight' is [16, 3, 7, 7] in the files, [16, 3, 14, 14] in the encoder",
        "'trunk.ln_post.bias' is missing in the files",
        "'trunk.attn_pool.query' is in the files but not in the encoder",
    ):
        assert f"- {line}" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_the_first_errors_of_every_kind_are_listed(source: Path) -> None:
    deep = {**TINY, "num_layers": 9, "embed_dim": 24}
    with pytest.raises(CheckpointError, match=r"embed_dim=16, num_layers=2") as caught:
        encoders.create(NAME, weights=source, **deep)
    assert "in the files, [24" in str(caught.value)
    assert "'trunk.transformer.resblocks.2.ln_1.weight' is missing in the files" in str(caught.value)
    assert "... and" in str(caught.value)


def test_parts_that_belong_together(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    state = CLIPVisionModel(config).state_dict()
    del state["encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(state, tmp_path / "clip.bin")
    with pytest.raises(CheckpointError) as caught:
        encoders.create(NAME, weights=tmp_path / "clip.bin", **TINY)
    assert "'encoder.layers.1.self_attn.k_proj.bias' is missing beside 'encoder.layers.1.self_attn." in str(
        caught.value
    )


def test_an_unknown_format_lists_what_was_expected_and_what_came(tmp_path: Path) -> None:
    torch.save({f"layer{n}.weight": torch.zeros(1) for n in range(9)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError) as caught:
        encoders.create(NAME, weights=tmp_path / "resnet.pth", **TINY)
    text = str(caught.value)
    assert "is in no format that is known for encoder clip_vit_large_patch14. Expected one of:" in text
    for format in ("sphinxkit", "open_clip", "OpenAI's", "Hugging Face CLIPModel", "CLIPVisionModel", "timm CLIP"):
        assert format in text
    assert "came 9 tensors: layer0.weight, layer1.weight" in text


def test_meta_encoders_are_refused(source: Path) -> None:
    with torch.device("meta"):
        encoder = encoders.create(NAME, **TINY)
    with pytest.raises(CheckpointError, match="is on the meta device; build it on a real one"):
        encoders.load_weights(encoder, source)


def test_code_in_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"visual.class_embedding": Path("code")}, tmp_path / "clip.pth")
    with pytest.raises(CheckpointError, match="refused"):
        encoders.create(NAME, weights=tmp_path / "clip.pth", **TINY)


def test_positions_of_another_size_by_open_clips_rule(source: Path) -> None:
    from open_clip.model import resize_pos_embed

    encoder = encoders.create(NAME, **{**TINY, "image_size": 70})
    report = encoders.load_weights(encoder, source)
    assert report.resampled == ("trunk.positional_embedding from 2x2 to 5x5",)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual: Any = nn.Module()
            self.visual.grid_size = (5, 5)

    state = torch.load(source, weights_only=True)
    resize_pos_embed(state, Model())
    assert torch.equal(encoder.state_dict()["trunk.positional_embedding"], state["visual.positional_embedding"])


def test_positions_that_are_no_square(source: Path) -> None:
    state = torch.load(source, weights_only=True)
    state["visual.positional_embedding"] = torch.zeros(8, 16)
    torch.save(state, source)
    with pytest.raises(CheckpointError, match=r"'trunk.positional_embedding' is \[8, 16\] in the files, \[5, 16\] in"):
        encoders.create(NAME, weights=source, **TINY)


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


def test_opened_weights_are_a_source_of_the_encoders_tensors(source: Path) -> None:
    with torch.device("meta"):
        encoder = encoders.create(NAME, **{**TINY, "image_size": 42})
    weights = encoders.open_weights(encoder, source, activation="quick_gelu")
    assert isinstance(weights, TensorSource)
    assert list(weights.keys()) == list(encoder.state_dict())
    assert all(weights.shape(name) == tuple(tensor.shape) for name, tensor in encoder.state_dict().items())
    loaded = encoders.create(NAME, weights=source, **{**TINY, "image_size": 42})
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(weights.read(name), tensor)
        assert weights.dtype(name) == torch.float32
    assert weights.report.activation == "quick_gelu"
    assert next(encoder.parameters()).is_meta
