"""Adapters of peft itself against ours, on whole models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import nano
from sphinxkit.checkpoint.formats.peft import Adapter, write_adapter

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::FutureWarning:peft.*", "ignore:.*is_gradient_checkpointing"),
]

# float32: merged weights against a product beside; logits of scale 20
LOGITS_ATOL = 1e-4
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    sphinxkit.integrations.transformers.register()
    return sphinxkit.convert(nano.path(), tmp_path_factory.mktemp("hf") / "nano", format="hf")


def whole_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_of_peft_is_merged(folder: Path, tmp_path: Path, use_rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|down_proj)"
    config = LoraConfig(r=3, lora_alpha=12, target_modules=targets, init_lora_weights=False, use_rslora=use_rslora)
    theirs = get_peft_model(whole_model(folder), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    plain = sphinxkit.load(folder, accelerate=None)
    ours = sphinxkit.load(folder, overlay=tmp_path / "adapter", accelerate=None)
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        torch.testing.assert_close(ours(IDS), wanted, rtol=0, atol=LOGITS_ATOL)
        assert (plain(IDS) - wanted).abs().max() > 100 * LOGITS_ATOL
        # of another format, too
        native = sphinxkit.load(nano.path(), overlay=tmp_path / "adapter", accelerate=None)
        torch.testing.assert_close(native(IDS), ours(IDS), rtol=0, atol=0)


def test_peft_reads_an_adapter_of_ours(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = sphinxkit.load(folder, accelerate=None)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, weight in model.state_dict().items():
        if name.startswith("llm.layers.") and name.split(".")[-2] in ("q_proj", "k_proj", "up_proj"):
            rows, columns = weight.shape
            factors[name] = tuple(0.1 * torch.randn(shape, generator=generator) for shape in ((2, columns), (rows, 2)))
    target = tmp_path / "adapter"
    target.mkdir()
    llm = model.llm
    write_adapter(
        target, factors, num_heads=llm.num_heads, num_kv_heads=llm.num_kv_heads, has_vision=True, rank=2, alpha=1.0
    )
    assert Adapter(target).updates(llm.num_heads, llm.num_kv_heads)[0].keys() == factors.keys()
    theirs = PeftModel.from_pretrained(whole_model(folder), target).eval()
    ours = sphinxkit.load(folder, overlay=target, accelerate=None)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(input_ids=IDS).logits, rtol=0, atol=LOGITS_ATOL)
        assert (model(IDS) - ours(IDS)).abs().max() > 100 * LOGITS_ATOL
