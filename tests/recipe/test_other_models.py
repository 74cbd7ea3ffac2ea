"""Mix, diff and delta on folders of unknown models, by tensor names and shapes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError, RecipeError

Tensors = dict[str, Tensor]
LAYER = "model.layers.{}.self_attn.q_proj.weight"
FILES = {
    "preprocessor_config.json": "{}",
    "generation_config.json": '{"eos_token_id": [1, 2]}',
    "chat_template.jinja": "{{ messages }}",
    "tokenizer_config.json": '{"chat_template": "x"}',
    "merges.txt": "a b\n",
    "LICENSE.txt": "ours",
    "README.md": "the card of another model",
}


def vocabulary(size: int, first: str = "a") -> str:
    vocab = {first if index == 0 else f"t{index}": index for index in range(size)}
    return json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []})


def state_space(seed: int, vocab: int = 12, width: int = 8) -> Tensors:
    """The tensors of a model that is nothing like a LLaMA."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"backbone.embeddings.weight": (vocab, width), "backbone.norm_f.weight": (width,)}
    shapes |= {f"backbone.layers.{i}.mixer.A_log": (width, 3) for i in range(3)}
    tensors = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
    return tensors | {"backbone.steps": torch.tensor([3, 4])}


def llm(seed: int, vocab: int = 12, layers: int = 2, start: str = "model.", head: str = "lm_head.weight") -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{start}embed_tokens.weight": (vocab, 8), f"{start}norm.weight": (8,), head: (vocab, 8)}
    shapes |= {f"{start}{LAYER.format(i).removeprefix('model.')}": (8, 8) for i in range(layers)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def vlm(
    seed: int, vocab: int = 14, start: str = "language_model.model.", head: str = "language_model.lm_head.weight"
) -> Tensors:
    tower = {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8), "projector.bias": torch.ones(8)}
    return llm(seed, vocab, start=start, head=head) | tower


def write(folder: Path, tensors: Tensors, shards: int = 1, files: dict[str, str] | None = None, **config: Any) -> Path:
    folder.mkdir()
    names = list(tensors)
    parts = [names[index::shards] for index in range(shards)]
    files_of = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for name, part in zip(files_of, parts, strict=True):
        save_file({key: tensors[key].contiguous() for key in part}, folder / name)
    if shards > 1:
        weight_map = {key: name for name, part in zip(files_of, parts, strict=True) for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def read(folder: Path, stem: str = "model") -> Tensors:
    return {key: tensor for file in folder.glob(f"{stem}*.safetensors") for key, tensor in load_file(file).items()}


def test_any_two_folders_mix_and_the_first_ones_files_come_along(tmp_path: Path) -> None:
    a, b = state_space(0), state_space(1)
    first = write(
        tmp_path / "a", a, 2, FILES | {"tokenizer.json": vocabulary(12)}, model_type="mamba", torch_dtype="float16"
    )
    second = write(
        tmp_path / "b", b, files={"tokenizer.json": vocabulary(12)}, model_type="mamba", torch_dtype="bfloat16"
    )
    result = sphinxkit.mix([first, second], tmp_path / "out", beta=0.25, rules={"*.norm_f.*": "keep second"})
    mixed = read(tmp_path / "out")
    assert result.num_tensors == len(mixed) == len(a)
    key = "backbone.layers.1.mixer.A_log"
    assert torch.equal(mixed[key], (0.25 * a[key].float() + 0.75 * b[key].float()).bfloat16())
    assert torch.equal(mixed["backbone.norm_f.weight"], b["backbone.norm_f.weight"])
    assert torch.equal(mixed["backbone.steps"], a["backbone.steps"])
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert json.loads(written.pop("config.json")) == {"model_type": "mamba", "torch_dtype": "bfloat16"}
    made = json.loads(written.pop("provenance.json"))
    assert made["tensors"] == {"equal": 1, "keep": 1, "mix": 4}
    assert written == {key: text for key, text in FILES.items() if key != "README.md"} | {
        "tokenizer.json": vocabulary(12)
    }
    sphinxkit.mix([tmp_path / "out", second], tmp_path / "again", beta=1)
    assert all(torch.equal(tensor, mixed[key]) for key, tensor in read(tmp_path / "again").items())
    sphinxkit.mix([first, second], tmp_path / "out", beta=1, overwrite=True)
    assert torch.equal(read(tmp_path / "out")[key], a[key])


def test_large_results_are_sharded_with_an_index(tmp_path: Path) -> None:
    a = state_space(0)
    first = write(tmp_path / "a", a, model_type="mamba")
    with checkpoint.open(first, format="safetensors") as opened:
        checkpoint.save(tmp_path / "out", opened, format="safetensors", max_shard_bytes=200)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    with checkpoint.open(tmp_path / "out", format="safetensors") as again:
        assert all(torch.equal(again.read(key), a[key]) for key in a)


def test_names_and_shapes_that_differ_are_listed(tmp_path: Path) -> None:
    first = write(tmp_path / "a", state_space(0), model_type="mamba")
    tensors = state_space(1, vocab=14)
    tensors["backbone.extra"] = tensors.pop("backbone.layers.2.mixer.A_log")
    second = write(tmp_path / "b", tensors, model_type="mamba")
    with pytest.raises(CheckpointError) as caught:
        sphinxkit.mix([first, second], tmp_path / "out", beta=0.5)
    text = str(caught.value)
    assert "only in first: backbone.layers.2.mixer.A_log" in text
    assert "only in second: backbone.extra" in text
    assert "[12, 8] in first, [14, 8] in second" in text
    assert "'backbone.embeddings.weight: overlap first'" in text
    assert not (tmp_path / "out").exists()
    rules = {"backbone.extra": "drop", "backbone.layers.2.*": "keep first", "*embeddings*": "overlap first"}
    sphinxkit.mix([first, second], tmp_path / "out", beta=0, rules=rules)
    mixed = read(tmp_path / "out")
    assert torch.equal(mixed["backbone.embeddings.weight"], tensors["backbone.embeddings.weight"][:12])
    assert "backbone.extra" not in mixed


def test_tokenizers_and_configurations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = state_space(0), state_space(1)
    first = write(
        tmp_path / "a", a, files={"tokenizer.json": vocabulary(12)}, model_type="x", rope_theta=1.0, use_cache=True
    )
    longer = write(tmp_path / "b", b, files={"tokenizer.json": vocabulary(14)}, model_type="x", rope_theta=2.0)
    sphinxkit.mix([first, longer], tmp_path / "out", beta=0.5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == vocabulary(12)
    assert "rope_theta: 1.0 against 2.0" in caplog.text
    assert "use_cache" not in caplog.text
    other = write(tmp_path / "c", b, files={"tokenizer.json": vocabulary(12, "b"), "merges.txt": ""}, model_type="x")
    with pytest.raises(CheckpointError, match=r"id 0 is 'a' in .*a and 'b' in .*c \(1 ids in all\); .*tokenizer="):
        sphinxkit.mix([first, other], tmp_path / "no", beta=0.5)
    sphinxkit.mix([first, other], tmp_path / "yes", beta=0.5, tokenizer=other)
    assert (tmp_path / "yes" / "tokenizer.json").read_text() == vocabulary(12, "b")


def test_what_needs_a_known_model_is_refused(tmp_path: Path, golden: Path) -> None:
    first = write(tmp_path / "a", state_space(0), model_type="mamba")
    second = write(tmp_path / "b", state_space(1), model_type="mamba")
    with pytest.raises(CheckpointError, match="llm_only=True needs models that this library knows"):
        sphinxkit.mix([first, second], tmp_path / "out", beta=0.5, llm_only=True)
    with pytest.raises(CheckpointError, match="format 'hf': tensors under their files' own names are written as 'safe"):
        sphinxkit.mix([first, second], tmp_path / "out", beta=0.5, format="hf")
    with pytest.raises(CheckpointError, match="cannot be loaded; score it by a command"):
        sphinxkit.mix([first, second], sweep=[0, 1], score=lambda model: 0.0)
    with pytest.raises(CheckpointError, match="is of format 'sphinx' and cannot be taken by its files' names"):
        sphinxkit.mix([first, golden / "llama_ens5"], tmp_path / "out", beta=0.5)
    with pytest.raises(CheckpointError, match="format 'safetensors' is for tensors under a folder's own names"):
        sphinxkit.convert(golden / "llama_ens5", tmp_path / "out", format="safetensors")


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    good = write(tmp_path / "good", state_space(0))  # no config.json either
    twice = write(tmp_path / "twice", state_space(1))
    (twice / "model.safetensors").rename(twice / "one.safetensors")
    save_file({"backbone.norm_f.weight": torch.ones(8)}, twice / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'backbone.norm_f.weight' is in one.safetensors and in two.safetensors"):
        sphinxkit.mix([good, twice], tmp_path / "out", beta=0.5)
    (twice / "two.safetensors").unlink()
    sphinxkit.mix([good, twice], tmp_path / "out", beta=0)
    assert torch.equal(read(tmp_path / "out")["backbone.norm_f.weight"], state_space(1)["backbone.norm_f.weight"])
    sharded = write(tmp_path / "sharded", state_space(1), 2, model_type="mamba")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds 2 shards without their index"):
        sphinxkit.mix([good, sharded], tmp_path / "out", beta=0.5)


def test_a_head_that_is_tied_is_no_tensor_of_its_own(tmp_path: Path) -> None:
    a, b = (llm(seed) | {"x.norm.weight": torch.ones(1)} for seed in (0, 1))
    a["lm_head.weight"] = a["model.embed_tokens.weight"].clone()
    del b["lm_head.weight"]
    tied = {"model_type": "gemma", "tie_word_embeddings": True}
    first, second = write(tmp_path / "a", a, **tied), write(tmp_path / "b", b, **tied)
    sphinxkit.mix([first, second], tmp_path / "out", beta=0.5)
    assert read(tmp_path / "out").keys() == b.keys()
    a["lm_head.weight"] += 1  # not tied after all
    third = write(tmp_path / "c", a, **tied)
    with pytest.raises(CheckpointError, match=r"only in first: lm_head.weight"):
        sphinxkit.mix([third, second], tmp_path / "no", beta=0.5)


PLACES = [
    ("language_model.model.", "language_model.lm_head.weight"),  # LLaVA, InternVL
    ("model.language_model.", "lm_head.weight"),  # transformers 5
    ("model.", "lm_head.weight"),  # Qwen2-VL, the first LLaVA
]


@pytest.mark.parametrize(("start", "head"), PLACES)
def test_a_tuned_language_model_into_a_vision_language_model(tmp_path: Path, start: str, head: str) -> None:
    a, b, c = vlm(0, start=start, head=head), llm(1), llm(2)
    first = write(tmp_path / "vlm", a, files={"tokenizer.json": vocabulary(14)}, model_type="llava", text_config={})
    tuned = write(tmp_path / "llm", b, files={"tokenizer.json": vocabulary(12)}, model_type="llama")
    base = write(tmp_path / "base", c, model_type="llama")
    sphinxkit.mix("mix_llm_into_vlm", tmp_path / "out", models=[first, tuned])
    mixed = read(tmp_path / "out")
    key = LAYER.format(1)
    ours = start + key.removeprefix("model.")
    assert mixed.keys() == a.keys()
    assert torch.equal(mixed[ours], b[key])
    for name, source in ((start + "embed_tokens.weight", "model.embed_tokens.weight"), (head, "lm_head.weight")):
        assert torch.equal(mixed[name], torch.cat([b[source], a[name][12:]]))
    kept = [name for name in a if name.startswith(("vision", "projector"))]
    assert all(torch.equal(mixed[name], a[name]) for name in kept)
    sphinxkit.mix([first, tuned], tmp_path / "add", method="task_arithmetic", base=base, rename="llm_into_vlm")
    added = read(tmp_path / "add")
    torch.testing.assert_close(added[ours], a[ours] + b[key] - c[key])
    assert all(torch.equal(added[name], a[name]) for name in kept)
    report = sphinxkit.diff(first, tmp_path / "out")
    assert report.num_identical == len(kept)
    assert sphinxkit.diff(tmp_path / "out", tuned, rename="llm_into_vlm").num_identical == 3  # norm and two layers


def test_prefixes_of_ones_own(tmp_path: Path) -> None:
    a, b = vlm(0), {key.replace("model.", "decoder."): tensor for key, tensor in llm(1, vocab=14).items()}
    first, tuned = write(tmp_path / "vlm", a, model_type="x"), write(tmp_path / "llm", b, model_type="y")
    rename = {"decoder.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    rules = {"{vision_tower,projector}.*": "keep first"}
    sphinxkit.mix([first, tuned], tmp_path / "out", beta=0, rename=rename, rules=rules)
    assert torch.equal(
        read(tmp_path / "out")["language_model.norm.weight".replace(".", ".model.", 1)], b["decoder.norm.weight"]
    )
    with pytest.raises(RecipeError, match=r"no tensor has a name that begins with 'llm.'"):
        sphinxkit.mix([first, tuned], tmp_path / "no", beta=0, rename={"llm.": "x."})
    with pytest.raises(CheckpointError, match=r"would both be"):
        sphinxkit.mix([first, tuned], tmp_path / "no", beta=0, rename={"lm_head.": "decoder.norm."})
    with pytest.raises(RecipeError, match="rename: expected prefixes and their replacements or llm_into_vlm"):
        sphinxkit.mix([first, tuned], tmp_path / "no", beta=0, rename="llm")


def test_language_models_that_have_no_place(tmp_path: Path) -> None:
    first = write(tmp_path / "vlm", vlm(0), model_type="x")

    def into(tensors: Tensors, name: str) -> None:
        folder = write(tmp_path / name, tensors, model_type="llama")
        sphinxkit.mix([first, folder], tmp_path / "out", beta=0, rename="llm_into_vlm")

    with pytest.raises(CheckpointError, match=r"model\.\* \(5 names\) must have one place .* no place for them"):
        into(llm(1, layers=3), "deep")
    with pytest.raises(CheckpointError, match=r"lacks tensors of the first model's:\n.*layers\.1\.self_attn"):
        into(llm(1, layers=1), "shallow")
    headless = llm(1)
    del headless["lm_head.weight"]
    with pytest.raises(
        CheckpointError, match=r"lacks tensors of the first model's:\n.*language_model\.lm_head\.weight"
    ):
        into(headless, "headless")
    narrow = llm(1)
    narrow["model.norm.weight"] = torch.ones(9)
    narrow[LAYER.format(0)] = torch.ones(8, 9)
    with pytest.raises(CheckpointError, match=r"\[8, 8\] in first, \[8, 9\] in second"):
        into(narrow, "narrow")
    two = vlm(0) | {f"draft.{key}": tensor for key, tensor in llm(1).items()}
    first = write(tmp_path / "two", two, model_type="x")
    with pytest.raises(CheckpointError, match=r"which has at 'draft.*', 'language_model.*'; .*rename="):
        into(llm(1), "plain")


def test_deltas_of_any_folder(tmp_path: Path) -> None:
    a, b = state_space(0), state_space(1)
    b["backbone.new"] = torch.ones(3)
    base = write(tmp_path / "a", a, model_type="mamba")
    tuned = write(tmp_path / "b", b, 2, FILES, model_type="mamba")
    result = sphinxkit.extract_delta(base, tuned, tmp_path / "delta", dtype=torch.float32, verify=True)
    assert result.verified is not None
    assert result.verified.num_identical == len(b)
    assert (result.num_shards, result.num_tensors) == (None, len(b))
    assert checkpoint.detect(tmp_path / "delta") == []  # nothing takes it for a model
    key = "backbone.layers.0.mixer.A_log"
    assert torch.equal(read(tmp_path / "delta", "delta")[key], b[key].float() - a[key].float())
    sphinxkit.apply_delta(base, tmp_path / "delta", tmp_path / "back")
    restored = read(tmp_path / "back")
    assert restored.keys() == b.keys()
    assert all(torch.equal(restored[key], b[key]) for key in b)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == FILES["chat_template.jinja"]
    with pytest.raises(CheckpointError, match="is not the base of the delta"):
        sphinxkit.apply_delta(tuned, tmp_path / "delta", tmp_path / "no")
    with pytest.raises(CheckpointError, match="exists already"):
        sphinxkit.extract_delta(base, tuned, tmp_path / "delta")
    sphinxkit.extract_delta(base, tuned, tmp_path / "delta", overwrite=True)


def test_a_known_model_by_its_files_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``format="safetensors"`` takes folders of a LLaMA, too, by names and with a configuration that is copied."""
    caplog.set_level(logging.INFO)
    numbers: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = {"model_type": "llama", "vocab_size": 12, "strange": 1, **numbers}
    first, second = (write(tmp_path / name, llm(seed), **config) for seed, name in enumerate("ab"))
    sphinxkit.mix([first, second], tmp_path / "out", beta=0, rules={"model.norm.*": "keep first"})
    assert "unknown key 'strange'" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    del config["strange"]
    for folder in (first, second):
        (folder / "config.json").write_text(json.dumps(config))
    sphinxkit.mix([first, second], tmp_path / "by", beta=0, format="safetensors", rules={"model.norm.*": "keep first"})
    assert all(torch.equal(tensor, read(tmp_path / "out")[key]) for key, tensor in read(tmp_path / "by").items())
