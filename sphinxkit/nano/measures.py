"""What an ablation measures: how well answers to unseen scenes are told, word by word, without writing them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sphinxkit.data.collate import Example, ExampleMaker, collate_padded
from sphinxkit.errors import RecipeError
from sphinxkit.formatters.labels import IGNORE_INDEX
from sphinxkit.nano.world import TEXT_TASK, WorldMixture
from sphinxkit.nano.world.scene import Domain

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

SEED = 5
"""Of the scenes that are asked about; they are of the split ``val``, which training never shows."""

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Measure:
    """Something to be measured.

    Args:
        name: In front of its scores' names.
        tasks: Asked about one by one; "text" is plain text.
        domain: Of the scenes.
        size: Of the pictures, in pixels.
        options: Further options of ``World``.
    """

    name: str
    tasks: tuple[str, ...]
    domain: Domain = "synthetic"
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answers:
    """How well the answers to one task's questions are told, each token after the right ones before it.

    Args:
        loss: Nats per token of the answers.
        token_accuracy: Share of the tokens that are the most likely ones.
        exact: Share of the answers that are right from end to end; what greedy decoding would write.
    """

    loss: float
    token_accuracy: float
    exact: float


def measure(model: SphinxModel, wanted: Measure, num_scenes: int) -> dict[str, Answers]:
    """Measure a model on every task.

    Args:
        model: With tokenizer and template.
        wanted: What.
        num_scenes: Of each task, one question about each.
    Returns:
        By task.
    Raises:
        RecipeError: The model lacks a tokenizer or a template.
    """
    if model.tokenizer is None or model.conversation is None:
        raise RecipeError(f"measure {wanted.name}: the model has no tokenizer or no template")
    vision = model.vision
    make = ExampleMaker(
        template=model.conversation,
        tokenizer=model.tokenizer,
        image_size=0 if vision is None else vision.image_size,
        max_tokens=model.llm.max_seq_len,
        num_image_tokens=0 if vision is None else vision.num_tokens,
    )
    found = {}
    for task in wanted.tasks:
        mixture = WorldMixture(
            [{"task": task, "domain": wanted.domain}],
            seed=SEED,
            epoch_size=num_scenes,
            split="val",
            size=wanted.size,
            options=wanted.options,
        )
        examples = [make(mixture.read(ref)) for ref in mixture.order()]
        found[task] = _tell(model, examples, max(model.tokenizer.pad_id, 0))
    return found


@torch.no_grad()
def _tell(model: SphinxModel, examples: Sequence[Example], pad_id: int) -> Answers:
    losses: list[Tensor] = []
    rights: list[Tensor] = []
    exact: list[bool] = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = collate_padded(examples[start : start + BATCH_SIZE], pad_id)
        logits = model(batch.token_ids, batch.pixels, batch.image_rows)[:, :-1].float()
        labels = batch.labels[:, 1:]
        told = labels != IGNORE_INDEX
        right = (logits.argmax(-1) == labels) | ~told
        losses.append(torch.nn.functional.cross_entropy(logits[told], labels[told], reduction="none"))
        rights.append(right[told])
        exact += right.all(dim=1).tolist()
    return Answers(
        loss=torch.cat(losses).double().mean().item(),
        token_accuracy=torch.cat(rights).double().mean().item(),
        exact=fmean(exact),
    )


def summarize(wanted: Measure, found: Mapping[str, Answers]) -> dict[str, float]:
    """The tasks' means, every task alike, as ``name.loss``, ...; of plain text its perplexity.

    Args:
        wanted: What was measured.
        found: By task.
    """
    if wanted.tasks == (TEXT_TASK,):
        return {f"{wanted.name}.perplexity": math.exp(found[TEXT_TASK].loss)}
    return {
        f"{wanted.name}.{score}": fmean(getattr(answers, score) for answers in found.values())
        for score in ("loss", "token_accuracy", "exact")
    }
