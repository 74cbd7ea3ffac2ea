"""The step: the public implementation's losses and gradients, sums over batches, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.data.collate import Batch, Example, collate_packed, collate_padded
from sphinxkit.evaluation.parity import LOSS_ATOL, GoldenData
from sphinxkit.recipe import build
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training import LossModule, NonFiniteError, TrainPlan, TrainStep
from sphinxkit.training.optim import gradient_norm, make_optimizer
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.trainable_model import choose_trained

# Both sides are float32 through encoders, decoder and backward pass; norms are sums of many squares.
GRAD_NORM_RTOL = 1e-4
# Gradients of single entries, of scale 1e-2 to 1
GRAD_ATOL = 1e-5
# The same sums in another order, in float32
ORDER_ATOL = 1e-6

ALONE = ParallelDims(0, 1, torch.device("cpu"))
CHECKPOINTS = ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light"]


def make_step(model: sphinxkit.Recipe | torch.nn.Module, document: dict, **weights: float) -> TrainStep:
    plan = TrainPlan(**document)
    optimizer = make_optimizer(choose_trained(model, plan), plan)
    return TrainStep(LossModule(model), optimizer, ALONE, weights or {"all": 1.0}, max_grad_norm=8.0)


def gradients(step: TrainStep) -> dict[str, torch.Tensor]:
    named = step.module.model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def golden_batch(model, golden: GoldenData, fact: dict) -> Batch:
    """The public implementation's batch, whose padding has label 0."""
    token_ids, labels = golden.batch(fact["batch"])
    pixels = None if fact["images"] is None else model.preprocess([golden.image(name) for name in fact["images"]])
    rows = () if pixels is None else tuple(range(len(pixels)))
    return Batch(token_ids, labels, tuple(fact["batch"]), pixels, rows)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_losses_and_gradients_of_the_public_implementation(golden: Path, document, name: str) -> None:
    data = GoldenData(golden / name)
    model = sphinxkit.load(data.folder)
    step = make_step(model, document())
    with checkpoint.open(data.folder) as opened:
        keys = checkpoint.sphinx_key_map(opened.recipe["vision"])
    ours = dict(_released(model, keys))
    trained = [name for name, parameter in ours.items() if parameter.requires_grad]
    assert sorted(trained) == sorted(data.facts["trainable_parameters"])
    for fact in data.facts["loss"]:
        losses = step.backward({"all": [golden_batch(model, data, fact)]})
        assert losses.loss == pytest.approx(fact["loss"], abs=LOSS_ATOL)
        norms = {key: float(ours[key].grad.norm()) for key in fact["grad_norms"]}
        assert norms == pytest.approx(fact["grad_norms"], rel=GRAD_NORM_RTOL)
        prefix = f"grad.{fact['name']}."
        stored = {key.removeprefix(prefix): tensor for key, tensor in data.tensors.items() if key.startswith(prefix)}
        assert stored
        for key, tensor in stored.items():
            assert torch.allclose(ours[key].grad, tensor, atol=GRAD_ATOL), key
        assert step.update(rate=0.0) == pytest.approx(fact["total_grad_norm"], rel=GRAD_NORM_RTOL)


def _released(model, keys):
    for name, parameter in model.named_parameters():
        found = keys.to_theirs(name)
        if found is not None:
            yield found[0], parameter


@pytest.fixture
def model(document):
    torch.manual_seed(0)
    return build(document()["model"], tokenizer=Tokenizer(document()["tokenizer"]))


def examples(model, count: int = 8) -> list[Example]:
    """Every second one has an image; lengths differ."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        ids = torch.randint(3, 512, (4 + 3 * number,), generator=generator).tolist()
        pixels = torch.randn(3, 28, 28, generator=generator) if number % 2 else None
        made.append(Example(f"s{number}", ids, [-100, -100, *ids[2:]], pixels))
    return made


def test_four_small_batches_are_one_large_one(model, document) -> None:
    step = make_step(model, document())
    rows = examples(model)
    whole = step.backward({"all": [collate_padded(rows)]})
    expected = gradients(step)
    step.clear()
    parts = [rows[:1], rows[1:4], rows[4:5], rows[5:]]  # of different sizes: a mean of means would differ
    split = step.backward({"all": [collate_padded(part) for part in parts]})
    assert split.num_learnt == whole.num_learnt == {"all": sum(len(row.token_ids) - 2 for row in rows)}
    assert split.loss == pytest.approx(whole.loss, abs=ORDER_ATOL)
    found = gradients(step)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=ORDER_ATOL) for name in expected)


def test_packed_equals_padded(model, document) -> None:
    step = make_step(model, document())
    rows = examples(model)
    padded = step.backward({"all": [collate_padded(rows)]})
    expected = gradients(step)
    step.clear()
    packed = step.backward({"all": [collate_packed(rows[:5]), collate_packed(rows[5:])]})
    assert packed.loss == pytest.approx(padded.loss, abs=ORDER_ATOL)
    found = gradients(step)
    assert all(torch.allclose(found[name], expected[name], atol=ORDER_ATOL) for name in expected)


def test_streams_are_weighted_and_reported_apart(model, document) -> None:
    rows = examples(model)
    alone = {}
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        step = make_step(model, document(), **{name: 5.0})
        alone[name] = step.backward({name: [collate_packed(part)]}).loss, gradients(step)
        step.clear()
    step = make_step(model, document(), a=1.0, b=3.0)
    losses = step.backward({"a": [collate_packed(rows[:3])], "b": [collate_packed(rows[3:])]})
    assert losses.streams == pytest.approx({"a": alone["a"][0], "b": alone["b"][0]}, abs=ORDER_ATOL)
    assert losses.loss == pytest.approx((alone["a"][0] + 3 * alone["b"][0]) / 4, abs=ORDER_ATOL)
    for name, grad in gradients(step).items():
        expected = (alone["a"][1][name] + 3 * alone["b"][1][name]) / 4
        assert torch.allclose(grad, expected, atol=ORDER_ATOL), name


def test_a_stream_without_samples_does_not_weigh(model, document) -> None:
    rows = examples(model)
    step = make_step(model, document(), a=1.0, b=3.0)
    losses = step.backward({"a": [collate_packed(rows)], "b": []})
    assert losses.loss == losses.streams["a"]
    assert losses.num_learnt["b"] == 0


class Twins(ParallelDims):
    """Two processes that read the same, as each of them sees it; FSDP takes the mean of their gradients."""

    @property
    def dp_size(self) -> int:
        return 2

    def reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        return values.mul_(2) if op == dist.ReduceOp.SUM else values


def test_gradients_are_those_of_all_processes_together(model, document) -> None:
    """Twice the same samples have the same mean loss, and so the same gradients."""
    step = make_step(model, document())
    batches = {"all": [collate_packed(examples(model)[:4]), collate_packed(examples(model)[4:])]}
    alone = step.backward(batches)
    expected = gradients(step)
    step.clear()
    step.dims = Twins(0, 2, torch.device("cpu"))
    together = step.backward(batches)
    assert together.loss == pytest.approx(alone.loss)
    assert together.num_learnt["all"] == 2 * alone.num_learnt["all"]
    found = gradients(step)
    assert all(torch.allclose(found[name], expected[name], atol=ORDER_ATOL) for name in expected)


def test_a_batch_without_images_reaches_every_trained_parameter(model, document) -> None:
    """Processes wait for each other's gradients; one without images must have them too."""
    step = make_step(model, document())
    text = [example for example in examples(model) if example.pixels is None]
    step.backward({"all": [collate_packed(text)]})
    assert all(parameter.grad is not None for parameter in step.parameters)


def test_frozen_encoders_have_no_graph(model, document) -> None:
    step = make_step(model, document())
    batch = collate_packed(examples(model))
    encoder = model.vision.branches[0].encoders[0]
    assert not encoder(batch.pixels).prefix.requires_grad
    step.backward({"all": [batch]})
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_loss_that_is_not_finite_names_its_samples(model, document, monkeypatch) -> None:
    step = make_step(model, document())
    rows = examples(model)
    batches = [collate_packed(rows[:4]), collate_packed(rows[4:6]), collate_packed(rows[6:])]
    own = LossModule.forward

    def forward(self, batch: Batch) -> torch.Tensor:
        return own(self, batch) * (float("nan") if batch.ids == batches[1].ids else 1.0)

    monkeypatch.setattr(LossModule, "forward", forward)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"the loss is not finite; samples of the batches that gave it: s4, s5$"):
        step.backward({"all": batches})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_gradient_that_is_not_finite_updates_nothing(model, document) -> None:
    step = make_step(model, document())
    step.backward({"all": [collate_packed(examples(model))]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.llm.norm.weight.grad[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the norm of the gradients is (inf|nan), although every loss was finite"):
        step.update(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_clipping_limits_the_update(model, document) -> None:
    step = make_step(model, document())
    step.max_grad_norm = 1e-3
    step.backward({"all": [collate_packed(examples(model))]})
    norm = float(gradient_norm(step.parameters))
    assert norm > 0.1
    updated = []
    step.optimizer.register_step_pre_hook(lambda *_: updated.append(float(gradient_norm(step.parameters))))
    assert step.update(0.0) == pytest.approx(norm)
    assert updated == pytest.approx([1e-3], rel=1e-3)
