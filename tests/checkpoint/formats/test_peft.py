from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sphinxkit import checkpoint
from sphinxkit.checkpoint import MappingSource
from sphinxkit.checkpoint.formats.peft import Adapter, write_adapter
from sphinxkit.errors import CheckpointError

Model = tuple[MappingSource, dict[str, Any]]
Folders = tuple[Path, Path]
RANK, ALPHA = 3, 6.0
# float32 against float64: values up to 20, one product of rank 3 and one sum
ATOL = 5e-6
PREFIX = "base_model.model."
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def random_factors(base: dict[str, torch.Tensor], layers: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for module in (f"model.layers.{index}.{name}" for index in range(layers) for name in MODULES):
        rows, columns = base[f"{module}.weight"].shape
        factors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        factors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return factors


@pytest.fixture
def folders(tmp_path: Path, text_model: Model) -> Folders:
    source, recipe = text_model
    base = checkpoint.save(tmp_path / "hf", source, format="hf", recipe=recipe)
    factors = random_factors(load_file(base / "model.safetensors"))
    return base, save_adapter(tmp_path / "adapter", factors, base_model_name_or_path=str(base))


def expected(base: Path, adapter: Path, scale: Callable[[str], float], to: Path) -> checkpoint.Checkpoint:
    """The merge in float64 on Hugging Face's own tensors."""
    tensors, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in factors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = factors[name.replace("lora_A", "lora_B")].double()
        tensors[f"{module}.weight"] = (
            tensors[f"{module}.weight"] + scale(module) * up @ factors[name].double()
        ).float()
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((base / "config.json").read_text())
    return checkpoint.open(to)


def check_equal(merged: checkpoint.Checkpoint, wanted: checkpoint.Checkpoint, base: Path, num_changed: int) -> None:
    assert set(merged.keys()) == set(wanted.keys())
    for key in wanted:
        torch.testing.assert_close(merged.read(key), wanted.read(key), rtol=0, atol=ATOL)
    with checkpoint.open(base) as plain:
        assert sum(not torch.equal(merged.read(key), plain.read(key)) for key in plain) == num_changed


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"layers.1.self_attn.q_proj": 1.5}}])
def test_merged_as_peft_defines_it(folders: Folders, tmp_path: Path, options: dict[str, Any]) -> None:
    base, adapter = folders
    save_adapter(adapter, load_file(adapter / "adapter_model.safetensors"), **options)

    def scale(module: str) -> float:
        if "use_rslora" in options:
            return ALPHA / math.sqrt(RANK)
        is_named = "alpha_pattern" in options and module.endswith("layers.1.self_attn.q_proj")
        return (1.5 if is_named else ALPHA) / RANK

    with (
        checkpoint.open(base) as opened,
        checkpoint.overlay(opened, adapter) as merged,
        expected(base, adapter, scale, tmp_path / "merged") as wanted,
    ):
        check_equal(merged, wanted, base, 8)
        for key in ("llm.layers.0.attention.k_proj.weight", "llm.norm.weight"):
            out = torch.empty(merged.shape(key))
            merged.read_into(key, out)
            assert torch.equal(out, merged.read(key))


def test_opens_with_the_base_that_it_names(folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders
    with (
        checkpoint.open(adapter) as merged,
        expected(base, adapter, lambda _: ALPHA / RANK, tmp_path / "m") as wanted,
    ):
        check_equal(merged, wanted, base, 8)
        assert merged.path == base
    save_adapter(adapter, load_file(adapter / "adapter_model.safetensors"), base_model_name_or_path="org/name")
    with pytest.raises(CheckpointError, match=r"is a PEFT adapter; its base 'org/name' is no folder here; .*overlay="):
        checkpoint.open(adapter)


def test_whole_tensors_take_the_place_of_the_bases(folders: Folders) -> None:
    base, adapter = folders
    tensors = load_file(base / "model.safetensors")
    saved = {
        f"{PREFIX}{name}": tensors[name] + 1 for name in ("lm_head.weight", "model.layers.0.self_attn.k_proj.weight")
    }
    save_adapter(adapter, saved, modules_to_save=["lm_head"])
    with checkpoint.open(base) as opened, checkpoint.overlay(opened, adapter) as merged:
        for key in ("llm.lm_head.weight", "llm.layers.0.attention.k_proj.weight"):
            assert torch.equal(merged.read(key), opened.read(key) + 1)


def test_written_as_peft_reads_it(folders: Folders, tmp_path: Path) -> None:
    _, adapter = folders
    updates, whole = Adapter(adapter).updates(4, 2)
    assert not whole
    folder = tmp_path / "written"
    folder.mkdir()
    factors = {name: (each.down.read(), each.up.read()) for name, each in updates.items()}
    write_adapter(folder, factors, num_heads=4, num_kv_heads=2, has_vision=False, rank=RANK, alpha=ALPHA, base="b")
    wanted, found = (load_file(path / "adapter_model.safetensors") for path in (adapter, folder))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, "b")
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    write_adapter(folder, factors, num_heads=4, num_kv_heads=2, has_vision=True, rank=RANK, alpha=ALPHA)
    assert all(".language_model.layers." in name for name in load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(CheckpointError, match=r"no tensor for 'llm\.other\.weight'"):
        write_adapter(
            folder,
            {"llm.other.weight": factors["llm.layers.0.attention.q_proj.weight"]},
            num_heads=4,
            num_kv_heads=2,
            has_vision=True,
            rank=RANK,
            alpha=ALPHA,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True, "bias": "all"}, r"cannot be merged[^$]*use_dora is True(.|\n)*bias is 'all'"),
        ({"lora_alpha": None}, r"lora_alpha of 'model\.layers\.0\.[a-z_.]*' is None, not a number"),
    ],
)
def test_adapters_that_cannot_be_merged(folders: Folders, changes: dict[str, Any], message: str) -> None:
    base, adapter = folders
    factors = dict(
        sorted(load_file(adapter / "adapter_model.safetensors").items(), key=lambda item: "q_proj" not in item[0])
    )
    save_adapter(adapter, factors, **changes)
    with checkpoint.open(base) as opened, pytest.raises(CheckpointError, match=message):
        checkpoint.overlay(opened, adapter)


def test_tensors_that_do_not_fit(folders: Folders) -> None:
    base, adapter = folders
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_%s.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({}, r"cannot be read[^$]*it holds no tensors"),
        ({name % "A": torch.ones(RANK, 32)}, r"q_proj.lora_A.weight' of \[3, 32\]: lora_B is None"),
        ({name % "A": torch.ones(RANK, 32), name % "B": torch.ones(32, 2)}, r"of \[3, 32\]: lora_B is \[32, 2\]"),
        ({name % "A": torch.ones(RANK, 32), name % "B": torch.ones(16, RANK)}, r"is \[16, 32\], there \[32, 32\]"),
        (
            {f"{PREFIX}model.layers.7.mlp.up_proj.weight": torch.ones(40, 32)},
            r"there is no 'llm\.layers\.7\.mlp\.up_proj\.weight'",
        ),
        ({f"{PREFIX}bert.encoder.weight": torch.ones(2)}, r"'base_model\.model\.bert\.encoder\.weight' is no tensor"),
    ]
    with checkpoint.open(base) as opened:
        for tensors, message in cases:
            save_adapter(adapter, tensors)
            with pytest.raises(CheckpointError, match=message):
                checkpoint.overlay(opened, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds none of adapter_model\.safetensors"):
        Adapter(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        Adapter(adapter)
