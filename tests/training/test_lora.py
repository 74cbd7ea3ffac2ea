from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sphinxkit
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.training import LoraPlan, TrainPlan, read_log, train
from sphinxkit.training.lora import LoraLinear, add_lora, draw_factors, is_factor, merge_lora
from sphinxkit.training.parallel import open_parallel_dims
from sphinxkit.training.trainable_model import build_trainable, find_recipe

# float32: one product instead of two
MERGE_ATOL = 1e-5
# float32: an update of exactly 0, in another order of additions
START_ATOL = 1e-5
# bfloat16 has 8 bits of mantissa; losses of 5 to 6
BF16_ATOL = 2e-2


@pytest.mark.parametrize(("rank", "alpha"), [(1, 4.0), (2, 8.0), (2, 1.0), (4, 4.0)])
def test_update_by_hand(rank: int, alpha: float) -> None:
    layer = LoraLinear(nn.Linear(3, 2), rank, alpha)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    plain = x @ layer.weight.T + layer.bias
    layer.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), plain)
    with torch.no_grad():
        layer.lora_down.zero_()
        layer.lora_down[-1] = torch.tensor([1.0, 0.0, 1.0])
        layer.lora_up[:, -1] = torch.tensor([1.0, -2.0])
    update = alpha / rank * torch.tensor([[4.0, -8.0]])  # (1 + 3) * (1, -2)
    assert torch.allclose(layer(x), plain + update)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_down", "lora_up"]
    merged = merge_lora({f"a.{key}": value for key, value in layer.state_dict().items()}, LoraPlan(rank, alpha))
    assert merged.keys() == {"a.weight", "a.bias"}
    assert torch.allclose(x @ merged["a.weight"].T + merged["a.bias"], plain + update, atol=MERGE_ATOL)


def test_factors_depend_on_seed_and_name_alone() -> None:
    def drawn(seed: int, *names: str) -> dict[str, torch.Tensor]:
        module = nn.ModuleDict({name: nn.Linear(3, 2) for name in names})
        add_lora(module, LoraPlan(rank=2, targets=list(names)))
        draw_factors(module, seed)
        found = dict(module.named_parameters())
        assert all(found[name].requires_grad is is_factor(name) for name in found)
        return {name: value.detach() for name, value in found.items() if is_factor(name)}

    both, one = drawn(1, "q_proj", "k_proj"), drawn(1, "k_proj")
    assert both.keys() == {f"{name}.{factor}" for name in ("q_proj", "k_proj") for factor in ("lora_down", "lora_up")}
    assert all(torch.equal(both[name], one[name]) for name in one)
    assert not torch.equal(both["q_proj.lora_down"], both["k_proj.lora_down"])
    assert not torch.equal(drawn(2, "k_proj")["k_proj.lora_down"], one["k_proj.lora_down"])
    bound = 1 / 3**0.5
    assert 0 < one["k_proj.lora_down"].abs().max() <= bound
    assert not one["k_proj.lora_up"].any()


def test_a_target_that_is_nowhere() -> None:
    with pytest.raises(RecipeError, match="lora.targets: no linear layer is called k_proj"):
        add_lora(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}), LoraPlan(targets=["q_proj", "k_proj"]))


def test_of_a_mixture_of_experts_attention_and_routers_are_updated(document, tmp_path: Path) -> None:
    model = document()["model"]
    model = {**model, "llm": {**model["llm"], "moe": {"num_experts": 4, "num_experts_per_tok": 2}}}
    base = {"model": model, "train": ["projectors"], "steps": 2, "export": True}
    with pytest.raises(
        RecipeError, match=r"gate_proj .*\(the experts' matrices take no LoRA\); known: .* router, v_proj"
    ):
        train(TrainPlan(**document(**base, lora={"rank": 4}, output=str(tmp_path / "refused"))))
    plan = TrainPlan(**document(**base, lora={"rank": 4, "targets": ["q_proj", "router"]}))
    assert train(plan).status == "done"
    trained = sphinxkit.load(Path(plan.output) / "model")
    exported = trained.state_dict()
    torch.manual_seed(plan.seed)
    start = sphinxkit.build(plan.model, tokenizer=trained.tokenizer).state_dict()
    changed = {name for name in start if name.startswith("llm.") and not torch.equal(exported[name], start[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "router"}


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


@pytest.mark.parametrize(
    ("dtype", "atol"), [("float32", START_ATOL), pytest.param("bfloat16", BF16_ATOL, marks=pytest.mark.slow)]
)
def test_updates_of_a_complete_checkpoint_start_from_its_loss(
    document, straight: Path, tmp_path: Path, dtype: str, atol: float
) -> None:
    """The language model is then built on the meta device, its factors with it."""
    base = {"init_from": str(straight / "model"), "allow_random_encoders": False, "tokenizer": None, "dtype": dtype}
    curves = []
    for name, lora in (("plain", None), ("lora", {"rank": 4, "alpha": 8.0})):
        plan = TrainPlan(**document(**base, train=["projectors"], lora=lora, steps=4, output=str(tmp_path / name)))
        assert train(plan).status == "done"
        curves.append([record["loss"] for record in read_log(tmp_path / name)])
    assert curves[1][0] == pytest.approx(curves[0][0], abs=atol)
    assert curves[1][-1] < curves[1][0]


def test_a_run_goes_on_from_the_adapter_that_it_wrote(document, straight: Path, tmp_path: Path) -> None:
    """The adapter over the base is the exported language model, bit for bit."""
    base = {"init_from": str(straight / "model"), "allow_random_encoders": False, "tokenizer": None, "train": []}
    settings = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "down_proj"]}
    first = tmp_path / "first"
    assert train(TrainPlan(**document(**base, lora=settings, steps=3, export=True, output=str(first)))).status == "done"
    exported = sphinxkit.load(first / "model").state_dict()
    merged = sphinxkit.load(straight / "model", overlay=first / "adapter").state_dict()
    assert all(torch.equal(merged[name], exported[name]) for name in exported)
    assert not torch.equal(
        merged["llm.layers.0.attention.q_proj.weight"],
        sphinxkit.load(straight / "model").state_dict()["llm.layers.0.attention.q_proj.weight"],
    )

    def first_loss(name: str, **changes: object) -> float:
        plan = TrainPlan(**document(**{**base, "steps": 1, "output": str(tmp_path / name), **changes}))
        assert train(plan).status == "done"
        return read_log(tmp_path / name)[0]["loss"]

    going_on = first_loss("second", lora={**settings, "init_from": str(first / "adapter")})
    assert going_on == pytest.approx(
        first_loss("merged", init_from=str(first / "model"), lora=settings), abs=MERGE_ATOL
    )
    with pytest.raises(CheckpointError, match=r"lora\.init_from: layers.0.*q_proj: the adapter has .*, the plan"):
        first_loss("third", lora={**settings, "rank": 2, "init_from": str(first / "adapter")})
    with pytest.raises(CheckpointError, match=r"lora\.init_from: updates .*down_proj.*, which lora.targets leaves out"):
        first_loss("fourth", lora={**settings, "targets": ["q_proj"], "init_from": str(first / "adapter")})


def test_the_frozen_language_model_is_held_in_the_dtype_that_it_is_used_in(document, straight: Path) -> None:
    base = {"init_from": str(straight / "model"), "allow_random_encoders": False, "tokenizer": None, "train": []}
    for dtype, held in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        plan = TrainPlan(**document(**base, lora={"rank": 4, "targets": ["q_proj"]}, dtype=dtype))
        with open_parallel_dims(plan) as dims:
            llm = build_trainable(plan, find_recipe(plan), dims).model.llm
            found = {(is_factor(name), p.requires_grad): p.dtype for name, p in llm.named_parameters()}
            assert found == {(False, False): held, (True, True): torch.float32}


def test_projectors_alone(document) -> None:
    plan = TrainPlan(**document(train=["projectors"], export=True, steps=2))
    train(plan)
    torch.manual_seed(plan.seed)
    model = sphinxkit.load(Path(plan.output) / "model")
    start = sphinxkit.build(plan.model, tokenizer=model.tokenizer).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed
    assert all(".projector." in name for name in changed)
