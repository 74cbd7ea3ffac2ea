from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sphinxkit
from sphinxkit.errors import RecipeError
from sphinxkit.training import LoraPlan, TrainPlan, read_log, train
from sphinxkit.training.lora import LoraLinear, add_lora, merge_lora

# float32: one product instead of two
MERGE_ATOL = 1e-5


def test_update_by_hand() -> None:
    layer = LoraLinear(nn.Linear(3, 2), rank=1, alpha=4.0)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    plain = x @ layer.weight.T + layer.bias
    layer.init_weights()
    assert torch.equal(layer(x), plain)
    with torch.no_grad():
        layer.lora_down.copy_(torch.tensor([[1.0, 0.0, 1.0]]))
        layer.lora_up.copy_(torch.tensor([[1.0], [-2.0]]))
    assert torch.allclose(layer(x), plain + torch.tensor([[16.0, -32.0]]))  # 4/1 * (1 + 3) * (1, -2)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_down", "lora_up"]
    merged = merge_lora({f"a.{key}": value for key, value in layer.state_dict().items()}, LoraPlan(1, 4.0))
    assert merged.keys() == {"a.weight", "a.bias"}
    assert torch.allclose(x @ merged["a.weight"].T + merged["a.bias"], layer(x), atol=MERGE_ATOL)


def test_a_target_that_is_nowhere() -> None:
    with pytest.raises(RecipeError, match="lora.targets: no linear layer is called k_proj"):
        add_lora(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), LoraPlan(targets=["q_proj", "k_proj"]))


def test_a_run_trains_updates_and_exports_them_merged(document) -> None:
    changes = {"train": ["projectors", "image_delimiters"], "lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}}
    plan = TrainPlan(**document(**changes, export=True, stop_after=4))
    train(plan)
    assert train(TrainPlan(**document(**changes, export=True))).status == "done"
    losses = [record["loss"] for record in read_log(Path(plan.output))]
    assert losses[-1] < losses[0]
    model = sphinxkit.load(Path(plan.output) / "model")
    torch.manual_seed(plan.seed)
    start = sphinxkit.build(plan.model, tokenizer=model.tokenizer).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {name.split(".")[-2] for name in changed if name.startswith("llm.")} == {"q_proj", "down_proj"}
    assert {name.split(".")[1] for name in changed if name.startswith("vision.")} == {
        "branches",
        "start_token",
        "end_token",
    }
    assert not any(".encoders." in name for name in changed)


def test_projectors_alone(document) -> None:
    plan = TrainPlan(**document(train=["projectors"], export=True, steps=2))
    train(plan)
    torch.manual_seed(plan.seed)
    model = sphinxkit.load(Path(plan.output) / "model")
    start = sphinxkit.build(plan.model, tokenizer=model.tokenizer).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed
    assert all(".projector." in name for name in changed)
