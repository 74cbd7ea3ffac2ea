from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from sphinxkit import checkpoint
from sphinxkit.checkpoint import MappingSource, ModuleSource
from sphinxkit.errors import CheckpointError

Model = tuple[MappingSource, dict[str, Any]]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_cast_and_progress(tmp_path: Path, text_model: Model) -> None:
    source, _ = text_model
    tensors = {key: source.read(key) for key in source.keys()} | {"counter": torch.tensor(3)}  # noqa: SIM118
    seen: dict[str, int] = {}
    folder = checkpoint.save(
        tmp_path / "own",
        MappingSource(tensors),
        dtype=torch.bfloat16,
        progress=lambda key, size: seen.update({key: size}),
    )
    with checkpoint.open(folder) as opened:
        assert opened.dtype("counter") == torch.int64
        for key in source.keys():  # noqa: SIM118
            assert torch.equal(opened.read(key), tensors[key].bfloat16())
    assert seen == {key: tensor.numel() * (8 if key == "counter" else 2) for key, tensor in tensors.items()}


def test_one_part_of_a_multimodal_model(golden: Path, tmp_path: Path, same: Callable[..., None]) -> None:
    with checkpoint.open(golden / "llama_ens5") as opened:
        folder = checkpoint.save(tmp_path / "llm", opened, part="llm")
        with checkpoint.open(folder) as text:
            assert text.recipe == {key: value for key, value in opened.recipe.items() if key != "vision"}
            assert all(key.startswith("llm.") for key in text.keys())  # noqa: SIM118
        for format in ("meta", "hf"):
            with pytest.raises(
                CheckpointError,
                match=r"holds a language model alone, .* 'vision\..*part='llm'",
            ):
                checkpoint.save(tmp_path / "x", opened, format=format)
            with pytest.raises(CheckpointError, match="the unused group has no place"):
                checkpoint.save(tmp_path / "x", opened, format=format, part="llm", unused=opened.unused)
        with pytest.raises(CheckpointError, match="the unused group has no place"):
            checkpoint.save(tmp_path / "x", opened, part="llm", unused=opened.unused)
        released = checkpoint.save(tmp_path / "released", opened, part="llm", format="sphinx")
        assert json.loads((released / "meta.json").read_text()) == {"llama_type": "llama"}
        with checkpoint.open(released) as one, checkpoint.open(folder) as other:
            same(one, other)
            assert one.recipe == other.recipe
    assert tree(tmp_path).count("x") == 0


def test_recipe_text_tokenizer_and_extra_files(tmp_path: Path, golden: Path) -> None:
    with checkpoint.open(golden / "llama_ens_light") as opened:
        folder = checkpoint.save(
            tmp_path / "own",
            opened,
            recipe_yaml="kind: model\n# mine\n",
            tokenizer=opened.tokenizer_path,
            unused=opened.unused,
            extra_files={"provenance.json": "{}"},
        )
    assert (folder / "recipe.yaml").read_text() == "kind: model\n# mine\n"
    assert (folder / "provenance.json").read_text() == "{}"
    assert (folder / "tokenizer.model").read_bytes() == (golden / "llama_ens_light" / "tokenizer.model").read_bytes()


def test_a_module_is_a_source(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    folder = checkpoint.save(tmp_path / "own", ModuleSource(module))
    with checkpoint.open(folder) as opened:
        assert set(opened.keys()) == set(module.state_dict())
        assert torch.equal(opened.read("0.weight"), module[0].weight)


def test_differences_have_their_own_file_names(tmp_path: Path, text_model: Model, same: Callable[..., None]) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "delta", source, format="sphinx", num_shards=2, recipe=recipe, delta=True)
    assert "consolidated.01-of-02.model-diff.pth" in tree(folder)
    with checkpoint.open(folder, delta=True) as opened:
        same(opened, source)
    with pytest.raises(CheckpointError, match="delta=True: format 'meta' has no place for differences"):
        checkpoint.save(tmp_path / "x", source, format="meta", recipe=recipe, delta=True)


def test_what_is_there_is_never_lost_by_mistake(tmp_path: Path, text_model: Model) -> None:
    source, _ = text_model
    folder = checkpoint.save(tmp_path / "own", source)
    with pytest.raises(CheckpointError, match=r"exists already; pass overwrite=True"):
        checkpoint.save(folder, source)
    checkpoint.save(folder, source, overwrite=True, max_shard_bytes=20_000)
    assert "model.safetensors" not in tree(folder)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint but holds thesis.tex; it will not be replaced"):
        checkpoint.save(folder, source, overwrite=True)
    (folder / "thesis.tex").rename(tmp_path / "thesis.tex")
    (folder / "sub").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint but holds sub"):
        checkpoint.save(folder, source, overwrite=True)
    project = tmp_path / "project"
    project.mkdir()
    checkpoint.save(project, source)
    shutil.rmtree(project)
    project.mkdir()
    (project / "package.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint but holds package.json"):
        checkpoint.save(project, source, overwrite=True)
    with pytest.raises(CheckpointError, match=r"thesis.tex: is a file; a checkpoint is a folder"):
        checkpoint.save(tmp_path / "thesis.tex", source)


@pytest.mark.parametrize(
    "files",
    [
        {"package.json": "{}", "README.md": "mine", "x.bin": "data"},
        {"records.json": "[1, 2]", "records.bin": "data"},
        {"config.json": "{}", "model.safetensors": "a text of its own"},
        {"consolidated.00.pth": "data"},
        {"model.safetensors.index.json": "{}", "weights.bin": "PK\3\4data"},
    ],
)
def test_a_folder_of_another_program_is_not_replaced(tmp_path: Path, text_model: Model, files: dict[str, str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match="is not a checkpoint but holds"):
        checkpoint.save(folder, text_model[0], overwrite=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_a_damaged_checkpoint_may_be_replaced(tmp_path: Path, text_model: Model, same: Callable[..., None]) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "own", source, format="meta", num_shards=2, recipe=recipe)
    (folder / "consolidated.00.pth").unlink()
    checkpoint.save(folder, source, recipe=recipe, overwrite=True)
    with checkpoint.open(folder) as opened:
        same(opened, source)


def test_two_saves_to_one_new_folder(tmp_path: Path, text_model: Model, same: Callable[..., None]) -> None:
    source, _ = text_model

    def save_again(key: str, size: int) -> None:
        with pytest.raises(CheckpointError, match="another process is writing it"):
            checkpoint.save(tmp_path / "own", source)

    with checkpoint.open(checkpoint.save(tmp_path / "own", source, progress=save_again)) as opened:
        same(opened, source)


def test_a_checkpoint_may_be_replaced_by_itself(tmp_path: Path, text_model: Model, same: Callable[..., None]) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "own", source, recipe=recipe)
    with checkpoint.open(folder) as opened:
        checkpoint.save(folder, opened, format="hf", overwrite=True)
    with checkpoint.open(folder) as opened:
        assert opened.format == "hf"
        same(opened, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf"}, "unknown checkpoint format 'gguf'"),
        ({"format": "sphinx"}, r"format 'sphinx' writes the model's numbers beside it; pass recipe="),
        ({"format": "hf", "recipe": {"kind": "model"}}, "format 'hf' writes the model's numbers"),
        (
            {"format": "hf", "num_shards": 2},
            r"num_shards=2: format '\w+' has no tensor-parallel shards",
        ),
        ({"format": "meta", "num_shards": 0}, r"num_shards=0: expected a positive number"),
        (
            {"format": "meta", "num_shards": 3},
            r"'tok_embeddings.weight' \[24, 32\] cannot be split into 3 along dimension 1",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, text_model: Model, options: dict[str, Any], message: str) -> None:
    source, recipe = text_model
    if options.get("num_shards"):
        options = {"recipe": recipe} | options
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "x", source, **options)
    assert tree(tmp_path) == []


def test_names_and_arrangements_that_a_format_does_not_have(tmp_path: Path, text_model: Model, golden: Path) -> None:
    source, recipe = text_model
    odd = MappingSource({key: source.read(key) for key in source.keys()} | {"llm.adapter": torch.zeros(1)})  # noqa: SIM118
    for format in ("sphinx", "meta", "hf"):
        with pytest.raises(CheckpointError, match="1 tensors have no name in this format, 'llm.adapter' for one"):
            checkpoint.save(tmp_path / "x", odd, format=format, recipe=recipe)
    with pytest.raises(CheckpointError, match="there is nothing to save"):
        checkpoint.save(tmp_path / "x", MappingSource({}))
    with pytest.raises(CheckpointError, match="there is nothing to save in part 'llm'"):
        checkpoint.save(tmp_path / "x", MappingSource({"vision.a": torch.zeros(1)}), part="llm")
    with checkpoint.open(golden / "llama_ens") as opened:
        recipe = opened.recipe
        recipe["vision"]["image_size"] = 336
        with pytest.raises(CheckpointError, match="the released layout has no type for this recipe's vision part"):
            checkpoint.save(tmp_path / "x", opened, format="sphinx", recipe=recipe)
    assert tree(tmp_path) == []


class FullDisk:
    """A file whose disk is full after some bytes."""

    def __init__(self, real: Any, budget: list[int], code: int) -> None:
        self.real, self.budget, self.code = real, budget, code

    def write(self, data: Any) -> int:
        self.budget[0] -= len(memoryview(data).cast("B"))
        if self.budget[0] < 0:
            raise OSError(self.code, "No space left on device")
        return int(self.real.write(data))

    def tell(self) -> int:
        return int(self.real.tell())

    def seek(self, *position: int) -> int:
        return int(self.real.seek(*position))

    def flush(self) -> None:
        self.real.flush()

    def close(self) -> None:
        self.real.close()

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *details: object) -> None:
        self.real.close()


@pytest.mark.parametrize("format", [name for name in checkpoint.formats.names() if name != "safetensors"])
@pytest.mark.parametrize("budget", [10, 5_000, 60_000])
def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, text_model: Model, monkeypatch: pytest.MonkeyPatch, format: str, budget: int
) -> None:
    source, recipe = text_model
    before = checkpoint.save(tmp_path / "old", source)
    names = tree(tmp_path)
    left = [budget]
    real_open = Path.open

    def opening(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = real_open(self, mode, *arguments, **options)
        return FullDisk(file, left, errno.ENOSPC) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", opening)
    for target in (tmp_path / "new", before):
        left[0] = budget
        with pytest.raises(CheckpointError, match="the disk is full; nothing was left behind"):
            checkpoint.save(target, source, format=format, recipe=recipe, overwrite=True)
        assert tree(tmp_path) == names
    monkeypatch.undo()
    with checkpoint.open(before, verify=True) as opened:
        assert len(opened) == len(list(source.keys()))


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, text_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = text_model
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 5, 5))
    with pytest.raises(CheckpointError, match=r"needs 1,\d{3},\d{3} bytes, the disk has 5 free"):
        checkpoint.save(tmp_path / "x", source)
    assert tree(tmp_path) == []


def test_other_trouble_with_the_disk(tmp_path: Path, text_model: Model) -> None:
    source, _ = text_model
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "model", source)
    with pytest.raises(CheckpointError, match=r"none.model: cannot be read: No such file"):
        checkpoint.save(tmp_path / "x", source, tokenizer=tmp_path / "none.model")
    assert tree(tmp_path) == ["file"]
