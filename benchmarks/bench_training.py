"""A training step: packed rows against padded ones, and against the same step written naively; encoders apart.

Lengths of samples are those that the procedural world's mixture of all tasks has, drawn from a seed, in tokens of the
tokenizer in ``recipes/``. Weights are random, the arithmetic is bfloat16 with float32 master weights, as in training.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Context, Sample, Work
from sphinxkit.data.collate import Batch, Example, collate_packed, collate_padded
from sphinxkit.data.conversations import encode_sample
from sphinxkit.data.packing import fill_rate, pack
from sphinxkit.llama import backends
from sphinxkit.nano.world import WorldMixture
from sphinxkit.nano.world.world import TASKS
from sphinxkit.recipe import build
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training import LossModule, TrainPlan, TrainStep
from sphinxkit.training.flops import llm_flops, vision_flops
from sphinxkit.training.optim import make_optimizer
from sphinxkit.training.parallel import ParallelDims, open_parallel_dims
from sphinxkit.training.sharding import checkpoint_layer, parallelize
from sphinxkit.training.trainable_model import choose_trained, part_parameters

TOLERANCE = 2e-2  # sums over thousands of tokens in another order, in 16 bit
NAIVE_ROUNDS = 3
MICRO = {
    "kind": "model",
    "vision": {
        "image_size": 28,
        "branches": [
            {
                "encoders": [
                    {
                        "type": "clip_vit_large_patch14",
                        "image_size": 28,
                        "embed_dim": 16,
                        "num_layers": 1,
                        "num_heads": 2,
                    }
                ],
                "projector": "linear",
            }
        ],
    },
    "llm": {"type": "llama", "vocab_size": 256, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64},
}
# What a CPU trains in seconds: 43 M parameters beside one small encoder; our choice.
MIDDLE = MICRO | {
    "llm": {
        "type": "llama",
        "vocab_size": 32000,
        "embed_dim": 512,
        "num_layers": 4,
        "num_heads": 8,
        "hidden_dim": 1408,
    }
}


# 6.7 G parameters of the language model and 0.05 G of projectors at 16 bytes (weight, gradient, two moments, float32),
# frozen encoders in 16 bit, and 20 GB for activations
SPHINX_7B_BYTES = 6.8e9 * 16 + 2.7e9 * 2 + 20e9


def cases(context: Context) -> Iterator[Case]:
    fits = context.device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory >= SPHINX_7B_BYTES
    if context.device.type == "cuda" and not fits and not context.micro:
        yield Case("sphinx_7b", skip=f"needs {SPHINX_7B_BYTES / 1e9:.0f} GB; sphinx_tiny is measured instead")
    recipe: Any = context.on("sphinx_7b" if fits else "sphinx_tiny", MIDDLE, MICRO)
    plan = TrainPlan(
        model=recipe,
        data={"all": {"mixture": "none", "batch_size": 1}},  # type: ignore[dict-item]
        output="none",
        device=context.device.type,
        pack_tokens=context.on(4096, 1024, 192),
        activation_checkpointing=context.device.type == "cuda",
    )
    model = build(recipe, device=context.device)
    with open_parallel_dims(plan) as dims:
        yield from _cases(context, model, plan, dims)


def _cases(context: Context, model: SphinxModel, plan: TrainPlan, dims: ParallelDims) -> Iterator[Case]:
    vision = model.vision
    if vision is None:
        return
    slots = vision.num_tokens
    image_flops = vision_flops(model)
    examples = _examples(context.on(48, 24, 6), model.llm.vocab_size, vision.image_size)
    totals = [example.length(slots) for example in examples]
    capacity = max(plan.pack_tokens, *totals)
    rows = pack(totals, capacity)
    packed = [collate_packed([examples[index] for index in row]) for row in rows]
    size = max(1, len(examples) // len(packed))
    padded = [collate_padded(examples[start : start + size]) for start in range(0, len(examples), size)]
    parts = choose_trained(model, plan)
    for branch in vision.branches:
        for encoder in branch.encoders:
            encoder.to(torch.bfloat16)
    pixels = next((batch.pixels for batch in packed if batch.pixels is not None), None)
    if pixels is not None:
        images = pixels.to(context.device)
        yield Case(
            f"visual tokens of {len(images)} images",
            {"sphinxkit": lambda images: _no_grad(vision, images)},
            Work(image_flops * len(images), images.nbytes, 0, dtype=torch.bfloat16),
            [(images,)],
            amount=len(images),
            unit="images",
        )
    naive, note = _naive(context, model, padded)
    module = LossModule(model)
    parallelize(module, model.llm, dims, plan)
    optimizer = make_optimizer(part_parameters(model, parts), plan)
    step = TrainStep(module, optimizer, dims, {"all": 1.0}, plan.max_grad_norm)
    learnt = sum(batch.num_learnt for batch in packed)
    flops = llm_flops(model.llm, totals, learnt) + image_flops * sum(example.pixels is not None for example in examples)

    def run(batches: list[Batch]) -> Sample:
        with context.timer() as timer, torch.enable_grad():
            losses = step.backward({"all": batches})
            step.update(0.0)  # the weights stay, so that every round computes the same
        extra = {"flops_per_second": flops / timer.seconds}
        return Sample(timer.seconds, None, torch.tensor(losses.loss), extra, timer.cpu_seconds)

    width = sum(batch.token_ids.numel() + slots * len(batch.token_ids) * bool(batch.num_images) for batch in padded)
    yield Case(
        f"step of {sum(totals)} tokens in {len(packed)} rows, {fill_rate(totals, rows, capacity):.0%} full; "
        f"padded {sum(totals) / width:.0%}",
        {"sphinxkit": lambda: run(packed), "padded": lambda: run(padded)} | naive,
        Work(flops, sum(p.nbytes for group in parts.values() for p in group), 0, dtype=torch.bfloat16),
        [()],
        amount=sum(totals),
        unit="tokens",
        tolerance=TOLERANCE,
        repeats=context.on(5, 3, None),
        max_seconds=context.on(120.0, 300.0, 30.0),
        note=note,
    )


def _naive(context: Context, model: SphinxModel, batches: list[Batch]) -> tuple[dict[str, Callable[[], Sample]], str]:
    """The naive step as candidates, and what a reader must know of it.

    On a CPU it has its own copy of the model and takes turns with ours. A GPU does not hold two copies at full size:
    there it runs before ours, on the same weights, and its times are played back. The micro run does both.
    """
    found: dict[str, Callable[[], Sample]] = {}
    note = ""
    if context.device.type == "cpu":
        found["naive"] = _naive_step(context, deepcopy(model), batches)
    if context.device.type == "cuda" or context.micro:
        name = "naive, before" if found else "naive"
        note = f"{name}: run before ours on the same weights, as two copies of model and optimiser do not fit"
        backend = model.llm.attention_backend
        try:
            step = _naive_step(context, model, batches)
            step()
            samples = cycle([step() for _ in range(NAIVE_ROUNDS)])
            found[name] = lambda: next(samples)
        except torch.cuda.OutOfMemoryError as error:
            note = f"{name} does not fit: {error}"
        finally:
            step = None  # type: ignore[assignment]
            model.llm.attention_backend = backend
            for parameter in model.parameters():
                parameter.grad = None
            gc.collect()
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
    return found, note


def _naive_step(context: Context, model: SphinxModel, batches: list[Batch]) -> Callable[[], Sample]:
    """Padded rows, eager attention, autocast over float32 weights, logits of every position; one batch after another.

    On a GPU layers are checkpointed as in ours; without it nothing of this size fits.
    """
    model.llm.attention_backend = backends.registry.build("eager")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    count = sum(batch.num_learnt for batch in batches)
    device = context.device.type
    forwards = [layer.forward for layer in model.llm.layers]

    def compute(batch: Batch) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch.token_ids, batch.pixels, batch.image_rows or None)
        targets = batch.labels[:, 1:].flatten().to(context.device)
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum") / count

    def run() -> Sample:
        total = 0.0
        if device == "cuda":
            for layer in model.llm.layers:
                checkpoint_layer(layer)
        with context.timer() as timer, torch.enable_grad():
            for batch in batches:
                loss = compute(batch.to(context.device))
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, 8.0)
            optimizer.step()
            optimizer.zero_grad()
        for layer, forward in zip(model.llm.layers, forwards, strict=True):
            layer.forward = forward
        return Sample(timer.seconds, None, torch.tensor(total), {}, timer.cpu_seconds)

    return run


def _no_grad(vision: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = vision(images)
    return tokens


def _examples(count: int, vocab_size: int, image_size: int) -> list[Example]:
    """As many samples of all tasks as the world's mixture begins with: their lengths, random tokens and pixels."""
    shape = build("sphinx_micro", device="meta")
    if shape.tokenizer is None or shape.conversation is None:
        raise ValueError("sphinx_micro has no tokenizer or no template")
    mixture = WorldMixture(TASKS, size=64)
    generator = torch.Generator().manual_seed(0)
    made = []
    for ref in islice(mixture.order(), count):
        sample = mixture.read(ref)
        encoded = encode_sample(sample, shape.conversation, shape.tokenizer)
        ids = torch.randint(3, vocab_size, (len(encoded.token_ids),), generator=generator).tolist()
        has_image = sample.type == "image-text"
        pixels = torch.randn(3, image_size, image_size, generator=generator) if has_image else None
        labels = [label if label < 0 else token for label, token in zip(encoded.labels, ids, strict=True)]
        made.append(Example(sample.id, ids, labels, pixels))
    return made
