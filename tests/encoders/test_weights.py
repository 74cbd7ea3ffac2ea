"""Sources, detection, errors and memory of ``load_weights``; the formats have files of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sphinxkit import encoders
from sphinxkit.encoders import Encoder
from sphinxkit.errors import CheckpointError, RegistryError
from sphinxkit.tensor_source import TensorSource
from tests.encoders.stand_ins import NAME, TINY


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
