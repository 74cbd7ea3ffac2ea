"""A format is one class behind a registry: another one works everywhere without a change elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sphinxkit import checkpoint, tensor_files
from sphinxkit.checkpoint import Checkpoint, MappingSource
from sphinxkit.checkpoint.formats import Format, OpenOptions, registry
from sphinxkit.checkpoint.writing import TensorInput, WriteOptions, json_text, specs_of
from sphinxkit.errors import CheckpointError


class Flat(Format):
    name = "flat"
    looks_like = "flat.safetensors"
    is_text_only = True

    def detect(self, folder: Path) -> bool:
        return (folder / "flat.safetensors").is_file()

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        tensors, files = tensor_files.read_tensor_files(folder / "flat.safetensors")
        recipe = tensor_files.read_json(folder / "recipe.json")
        return Checkpoint(folder, self.name, tensors, files, recipe=recipe)

    def write(self, folder: Path, source: TensorInput, unused: object, options: WriteOptions) -> dict[str, str]:
        tensor_files.write_safetensors(folder / "flat.safetensors", specs_of(source), source.read)
        return {"recipe.json": json_text(options.recipe)}


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))
    registry.register("flat")(Flat)


@pytest.mark.usefixtures("flat")
def test_a_new_format_is_opened_written_and_checked_like_the_others(
    tmp_path: Path, text_model: tuple[MappingSource, dict[str, Any]], same: Any
) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "flat", source, format="flat", recipe=recipe)
    assert checkpoint.detect(folder) == ["flat"]
    with checkpoint.open(folder) as opened:
        same(opened, source)
        assert opened.recipe == recipe
        with opened.verifying():  # it carries no checksums
            assert opened.read("llm.norm.weight").shape == (32,)
        checkpoint.save(tmp_path / "own", opened)
    for options, message in [
        ({"num_shards": 2}, r"num_shards=2: format 'flat' has no tensor-parallel shards"),
        ({"delta": True}, "format 'flat' has no place for differences"),
        ({"unused": source}, "the unused group has no place in 'flat'"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(tmp_path / "x", source, format="flat", recipe=recipe, **options)
    beside = MappingSource({"vision.start_token": source.read("llm.norm.weight")})
    with pytest.raises(CheckpointError, match="format 'flat' holds a language model alone"):
        checkpoint.save(tmp_path / "x", beside, format="flat", recipe=recipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"Expected one of: flat.safetensors, model.safetensors .* found nothing"):
        checkpoint.open(tmp_path / "empty")
