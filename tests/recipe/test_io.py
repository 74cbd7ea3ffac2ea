from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError, DataError


def test_a_tuned_folder_without_encoders_over_its_base(golden: Path, tmp_path: Path) -> None:
    base = golden / "llama_ens5_light"
    tuned = shutil.copytree(base, tmp_path / "tuned", ignore=shutil.ignore_patterns("golden*"))
    for file in tuned.glob("*.pth"):
        tensors = {name: tensor * 2 for name, tensor in torch.load(file)["model"].items() if "norm.weight" in name}
        torch.save({"model": {name: tensor for name, tensor in tensors.items() if "layers" in name}}, file)
    plain, model = (sphinxkit.load(base, overlay=over).state_dict() for over in (None, tuned))
    changed = {key for key, tensor in plain.items() if not torch.equal(tensor, model[key])}
    key = "llm.layers.0.attention_norm.weight"
    assert key in changed
    assert all(name.startswith("llm.layers.") for name in changed)
    torch.testing.assert_close(model[key], plain[key] * 2)
    with pytest.raises(DataError, match=r"expected one directory; overlay= lays others over it"):
        sphinxkit.load([base, tuned])  # type: ignore[arg-type]


def test_params_json_and_an_explicit_type(golden: Path, tmp_path: Path) -> None:
    base = golden / "llama_ens5_light"
    other = shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("golden*"))
    (other / "config.json").rename(other / "params.json")
    (other / "meta.json").write_text(json.dumps({"llama_type": "llama_ens_light"}))
    with checkpoint.open(other, llama_type="llama_ens5_light") as opened, checkpoint.open(base) as plain:
        assert opened.recipe == plain.recipe
    for name in ("nonsense", "llama_qformerv2_peft"):
        with pytest.raises(CheckpointError, match=rf"llama_type=: unknown llama_type '{name}'") as caught:
            sphinxkit.load(other, llama_type=name)
        assert "did you mean" not in str(caught.value)


def test_a_tokenizer_that_lies_elsewhere(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden / "llama_ens5_light", tmp_path / "m", ignore=shutil.ignore_patterns("golden*"))
    (tmp_path / "elsewhere").mkdir()
    (folder / "tokenizer.model").rename(tmp_path / "elsewhere" / "tokenizer.model")
    assert sphinxkit.load(folder).tokenizer is None
    for place in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "tokenizer.model"):
        found = sphinxkit.load(folder, tokenizer=place).tokenizer
        assert found is not None
        assert found.vocab_size == 512


def test_adapters_of_another_kind_are_refused_by_name(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden / "llama_ens5_light", tmp_path / "m", ignore=shutil.ignore_patterns("golden*"))
    file = min(folder.glob("*.pth"))
    tensors = torch.load(file)["model"]
    torch.save({"model": tensors | {"llma.layers.0.attention.lora_wq_l1.weight": torch.zeros(2, 2)}}, file)
    with pytest.raises(
        CheckpointError, match=r"lora_wq_l1.weight' belongs to adapters \(LoRA, biases\), which are not"
    ):
        sphinxkit.load(folder)
