from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.acceleration import FusedAccelerator, QuantizedLinear
from sphinxkit.checkpoint import MappingSource
from sphinxkit.cli import app
from sphinxkit.cli.options import LoadOptions, quantize_model
from sphinxkit.errors import CheckpointError, DataError, RecipeError
from sphinxkit.llama import LlamaModel, llama
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tensor_files.torch_zip import zip_checks


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A released directory whose shards differ in a replica."""
    folder = tmp_path / "released"
    shutil.copytree(golden / "llama_ens_light", folder, ignore=shutil.ignore_patterns("golden.*", "resized*"))
    path = folder / "consolidated.01-of-02.model.pth"
    content = torch.load(path, weights_only=True)
    content["model"]["llma.norm.weight"].add_(1)
    torch.save(content, path)
    return folder


def run(*arguments: str) -> None:
    CliRunner().invoke(app, [*arguments], catch_exceptions=False)


def test_convert_takes_the_first_replica_and_a_type(folder: Path, tmp_path: Path) -> None:
    (folder / "meta.json").unlink()
    arguments = ("convert", str(folder), "-o", str(tmp_path / "own"))
    with pytest.raises(CheckpointError, match=r"--replicas first"):
        run(*arguments)
    with pytest.raises(DataError, match="--replicas 'last': expected equal or first"):
        run(*arguments, "--replicas", "last")
    run(*arguments, "--replicas", "first", "--llama-type", "llama_ens_light")
    with checkpoint.open(tmp_path / "own", verify=True) as opened:
        assert opened.recipe["vision"]["image_size"] == 512


def test_checksums_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    path = folder / "consolidated.00-of-02.model.pth"
    record = next(check for check in zip_checks(path) if "/data/" in check.message)
    raw = bytearray(path.read_bytes())
    raw[record.end - 1] ^= 1
    path.write_bytes(raw)
    arguments = ("convert", str(folder), "-o", str(tmp_path / "own"), "--replicas", "first")
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        run(*arguments)
    ask = (
        "generate",
        str(folder),
        "-p",
        "a",
        "--raw",
        "--max-new-tokens",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        run(*ask, "--replicas", "first")
    run(*ask, "--replicas", "first", "--no-verify")
    run(*arguments, "--no-verify")
    assert (tmp_path / "own" / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "3"), "--bits 3: expected 8 or 4"),
        (("--accelerate", "all"), "--accelerate 'all': expected one of auto, compile, none"),
        (("--accelerate", "compile", "--bits", "8"), "on a CPU quantised weights are not compiled; expected one of"),
    ],
)
def test_what_cannot_be_sped_up_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run("generate", "nowhere", "-p", "a", "--device", "cpu", *options)


def tiny_llama() -> LlamaModel:
    return llama(vocab_size=32, embed_dim=64, num_layers=1, num_heads=4, hidden_dim=128, max_seq_len=128)


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_quantise(bits: int) -> None:
    model = SphinxModel(tiny_llama())
    quantize_model(model, bits)
    assert QuantizedLinear in {type(module) for module in model.llm.modules()}


def test_another_language_model_is_not_quantised() -> None:
    model = SphinxModel(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--bits: expected sphinxkit's LLaMA, got Linear"):
        quantize_model(model, 8)


@pytest.mark.parametrize(("mode", "kind"), [("auto", FusedAccelerator), ("none", type(None))])
def test_how_text_is_generated(golden: Path, mode: str, kind: type) -> None:
    loading = LoadOptions(device="cpu", dtype="float32", accelerate=mode, bits=8)
    model = loading.load(str(golden / "llama_ens_light"))
    assert type(model.llm.accelerator) is kind
    assert model.generate("a", max_new_tokens=2)


def test_overlay_and_tokenizer_of_convert_inspect_and_mix(golden: Path, tmp_path: Path) -> None:
    """A tuned directory that holds a part of the tensors, and a tokenizer that lies elsewhere."""
    whole, key = tmp_path / "whole", "llm.norm.weight"
    shutil.copytree(golden / "llama_ens", whole, ignore=shutil.ignore_patterns("tokenizer*", "golden.*", "resized*"))
    with checkpoint.open(golden / "llama_ens") as opened:
        recipe, norm = opened.recipe, opened.read(key).clone()
        tuned = checkpoint.save(tmp_path / "tuned", MappingSource({key: norm + 1}), recipe=recipe)
        words = shutil.copy(opened.tokenizer_path, tmp_path / "words.model")
    options = ("--overlay", str(tuned), "--tokenizer", str(words))
    run("convert", str(whole), "-o", str(tmp_path / "own"), *options)
    with checkpoint.open(tmp_path / "own") as opened:
        assert torch.equal(opened.read(key), norm + 1)
        assert opened.tokenizer_path is not None
    shown = CliRunner().invoke(app, ["inspect", str(whole), *options]).stdout
    assert f"ids: {words}" in shown
    assert sphinxkit.inspect(whole, overlay=tuned).stored.tokenizer is None
    both = ("mix", str(whole), str(whole), "-o")
    run(*both, str(tmp_path / "mixed"), "--beta", "0.5", "--overlay", "-", *options)
    with checkpoint.open(tmp_path / "mixed") as opened:
        assert torch.equal(opened.read(key), 0.5 * norm + 0.5 * (norm + 1))
    with pytest.raises(RecipeError, match="overlays: 1 for 2 models; null stands for none"):
        run(*both, str(tmp_path / "no"), "--overlay", str(tuned))
    with pytest.raises(DataError, match=r"are for checkpoints, sphinx_micro is a recipe"):
        run("inspect", "sphinx_micro", *options)
    with pytest.raises(CheckpointError, match=r"are for a checkpoint, not for a recipe"):
        run("convert", "sphinx_micro", "-o", str(tmp_path / "no"), "--part", "encoders", *options)
    small = tmp_path / "small.json"
    small.write_text('{"model": {"vocab": {"a": 99999}}}')
    with pytest.raises(CheckpointError, match="the tokenizer has 100000 pieces, the embedding"):
        run("inspect", str(whole), "--tokenizer", str(small))
