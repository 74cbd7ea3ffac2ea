"""Mixes and deltas of whole models in Hugging Face's layout have the files that belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint

NAMES = {
    *("config.json", "model.safetensors", "generation_config.json", "chat_template.jinja", "tokenizer.model"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.mark.parametrize("format", ["hf", None])
def test_a_mix_of_whole_models(golden: Path, tmp_path: Path, format: str | None) -> None:
    first = second = golden / "llama_ens_light"
    if format is None:  # the first model's
        first = second = sphinxkit.convert(first, tmp_path / "first", format="hf")
    sphinxkit.mix([first, second], tmp_path / "mixed", beta=0.25, format=format)
    assert {path.name for path in (tmp_path / "mixed").iterdir()} == NAMES | {"provenance.json"}
    with checkpoint.open(tmp_path / "mixed") as mixed, checkpoint.open(golden / "llama_ens_light") as source:
        assert mixed.format == "hf_sphinx"
        assert list(mixed) == list(source)
        key = "vision.start_token"
        torch.testing.assert_close(mixed.read(key), source.read(key))


def test_a_delta_laid_on_its_base(golden: Path, tmp_path: Path) -> None:
    model = sphinxkit.load(golden / "llama_ens_light")
    with torch.no_grad():
        model.llm.norm.weight.add_(1.0)
    base = sphinxkit.convert(golden / "llama_ens_light", tmp_path / "base", format="hf")  # without unused tensors
    model.save(tmp_path / "tuned")
    sphinxkit.extract_delta(base, tmp_path / "tuned", tmp_path / "delta")
    sphinxkit.apply_delta(base, tmp_path / "delta", tmp_path / "made", format="hf")
    assert {path.name for path in (tmp_path / "made").iterdir()} >= NAMES
    with checkpoint.open(tmp_path / "made") as made:
        assert torch.equal(made.read("llm.norm.weight"), model.llm.norm.weight)


def test_numbers_in_the_files(golden: Path, tmp_path: Path) -> None:
    folder = sphinxkit.convert(golden / "llama_ens5", tmp_path / "hf", format="hf")
    processor = json.loads((folder / "processor_config.json").read_text())
    vision = sphinxkit.load(folder).require_vision()
    assert processor == {
        "processor_class": "SphinxProcessor",
        "image_token": "<image>",
        "num_image_tokens": vision.num_tokens,
    }
    assert vision.num_tokens == 5 * (257 + 32 + 2)  # views of patches and class, Q-Former's queries, two delimiters
    image = json.loads((folder / "preprocessor_config.json").read_text())
    assert (image["image_processor_type"], image["size"]) == ("SphinxImageProcessor", {"height": 448, "width": 448})
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {
        "do_sample": False,
        "bos_token_id": 1,
        "eos_token_id": [2],
        "pad_token_id": 0,
        "stop_strings": ["\n###"],
    }
