"""A training step: packed rows against padded ones, and against the same step written naively; encoders apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Context, Sample, Work
from sphinxkit.data.collate import Batch, Example, collate_packed, collate_padded
from sphinxkit.data.packing import fill_rate, pack
from sphinxkit.llama import backends
from sphinxkit.recipe import build
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training import LossModule, TrainPlan, TrainStep
from sphinxkit.training.assembly import choose_trained
from sphinxkit.training.flops import llm_flops, vision_flops
from sphinxkit.training.optim import make_optimizer
from sphinxkit.training.parallel import World, open_world, parallelize

# Text lengths of a batch of the fine-tuning mixture, our estimate from its tasks' formats: short answers (VQA, REC,
# REG) are most of it, detection and captions the middle, layout and conversations the tail.
LENGTHS = (48, 56, 64, 52, 60, 72, 80, 96, 110, 130, 160, 210, 280, 400, 620, 900)
MICRO_LENGTHS = (6, 8, 12, 20)
# Sums over thousands of tokens in another order, in 16 bit; in float32 the same sums
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
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


def cases(context: Context) -> Iterator[Case]:
    recipe: Any = context.on("sphinx_7b", MIDDLE, MICRO)
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    plan = TrainPlan(
        model=recipe,
        data={"all": {"mixture": "none", "batch_size": 1}},  # type: ignore[dict-item]
        output="none",
        dtype="bfloat16" if dtype is torch.bfloat16 else "float32",
        device=context.device.type,
        pack_tokens=context.on(4096, 1024, 64),
        activation_checkpointing=context.device.type == "cuda",
    )
    model = build(recipe, device=context.device)
    with open_world(plan, model.llm.num_heads, model.llm.num_kv_heads) as world:
        yield from _cases(context, model, plan, world, dtype)


def _cases(context: Context, model: SphinxModel, plan: TrainPlan, world: World, dtype: torch.dtype) -> Iterator[Case]:
    vision = model.vision
    if vision is None:
        return
    slots = vision.num_tokens
    image_flops = vision_flops(model)
    lengths = context.pick(LENGTHS, MICRO_LENGTHS)
    if context.device.type == "cpu":
        lengths = lengths[::4] if len(lengths) > 4 else lengths
    examples = _examples(lengths, model.llm.vocab_size, vision.image_size)
    totals = [example.length(slots) for example in examples]
    rows = pack(totals, max(plan.pack_tokens, *totals))
    packed = [collate_packed([examples[index] for index in row]) for row in rows]
    size = max(1, len(examples) // len(packed))
    padded = [collate_padded(examples[start : start + size]) for start in range(0, len(examples), size)]
    parts = choose_trained(model, plan)
    for branch in vision.branches:
        for encoder in branch.encoders:
            encoder.to(dtype)
    pixels = next((batch.pixels for batch in packed if batch.pixels is not None), None)
    if pixels is not None:
        images = pixels.to(context.device)
        yield Case(
            f"visual tokens of {len(images)} images",
            {"sphinxkit": lambda images: _no_grad(vision, images)},
            Work(image_flops * len(images), images.nbytes, 0, dtype=dtype),
            [(images,)],
            amount=len(images),
            unit="images",
            tolerance=TOLERANCE[dtype],
        )
    naive, note = {}, "the naive step's own copy of the model does not fit beside ours"
    if context.device.type == "cpu":
        naive, note = {"naive": _naive_step(context, model, padded)}, ""
    module = LossModule(model)
    parallelize(module, model.llm, world, plan)
    optimizer = make_optimizer(parts, plan)
    step = TrainStep(module, optimizer, world, {"all": 1.0}, plan.clip)
    learnt = sum(batch.num_learnt for batch in packed)
    flops = llm_flops(model.llm, totals, learnt) + image_flops * len(examples)
    filled = fill_rate(totals, rows, max(plan.pack_tokens, *totals))

    def run(batches: list[Batch]) -> Sample:
        with context.timer() as timer, torch.enable_grad():
            losses = step.backward({"all": batches})
            step.update(0.0)  # the weights stay, so that every round computes the same
        extra = {"mfu_of_work": flops / timer.seconds}
        return Sample(timer.seconds, None, torch.tensor(losses.loss), extra)

    yield Case(
        f"step of {sum(totals)} tokens in {len(packed)} rows, {filled:.0%} full, {str(dtype).removeprefix('torch.')}",
        {"sphinxkit": lambda: run(packed), "padded": lambda: run(padded)} | naive,
        Work(flops, sum(p.nbytes for group in parts.values() for p in group), 0, dtype=dtype),
        [()],
        amount=sum(totals),
        unit="tokens",
        tolerance=TOLERANCE[dtype],
        repeats=context.on(5, 3, None),
        note=note,
    )


def _naive_step(context: Context, model: SphinxModel, batches: list[Batch]) -> Callable[[], Sample]:
    """Padded rows, eager attention, logits of every position, gradients summed batch by batch."""
    copy = deepcopy(model)
    copy.llm._backend = backends.registry.build("eager")
    trained = [parameter for parameter in copy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    count = sum(batch.num_learnt for batch in batches)

    def run() -> Sample:
        total = 0.0
        with context.timer() as timer, torch.enable_grad():
            for batch in batches:
                logits = copy(batch.token_ids, batch.pixels, batch.image_rows or None)
                targets = batch.labels[:, 1:].flatten()
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") / count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, 8.0)
            optimizer.step()
            optimizer.zero_grad()
        return Sample(timer.seconds, None, torch.tensor(total))

    return run


def _no_grad(vision: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = vision(images)
    return tokens


def _examples(lengths: tuple[int, ...], vocab_size: int, image_size: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        pixels = torch.randn(3, image_size, image_size, generator=generator) if number % 4 else None  # some text alone
        made.append(Example(str(number), ids, [-100] * (length // 2) + ids[length // 2 :], pixels))
    return made
