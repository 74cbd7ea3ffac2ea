"""Evaluation of the ablations: loss and accuracy on the tokens of correct answers, without generation."""

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
"""Seed of the scenes. They are of the split ``val``, which training never shows."""

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Questions that a model is evaluated on.

    Args:
        name: Prefix of its scores' names.
        tasks: Evaluated one by one; "text" is plain text.
        domain: Domain of the scenes.
        size: Side of the pictures, in pixels.
        options: Further options of ``World``.
    """

    name: str
    tasks: tuple[str, ...]
    domain: Domain = "synthetic"
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskMetrics:
    """How well a model predicts the answers of one task, each token from the right ones before it (teacher forcing).

    Args:
        loss: Nats per token of the answers.
        token_accuracy: Share of the answers' tokens that are the most likely ones.
        exact: Share of the answers whose tokens are all the most likely ones; greedy decoding would write these.
    """

    loss: float
    token_accuracy: float
    exact: float


def evaluate_variant(model: SphinxModel, eval_set: EvalSet, num_scenes: int) -> dict[str, TaskMetrics]:
    """Evaluate a model on every task of a set.

    Args:
        model: A model with tokenizer and template.
        eval_set: The questions.
        num_scenes: Scenes of each task, one question about each.
    Returns:
        The metrics by task.
    Raises:
        RecipeError: The model lacks a tokenizer or a template.
    """
    if model.tokenizer is None or model.conversation is None:
        raise RecipeError(f"evaluate {eval_set.name}: the model has no tokenizer or no template")
    vision = model.vision
    make = ExampleMaker(
        template=model.conversation,
        tokenizer=model.tokenizer,
        image_size=0 if vision is None else vision.image_size,
        max_tokens=model.llm.max_seq_len,
        num_image_tokens=0 if vision is None else vision.num_tokens,
    )
    found = {}
    for task in eval_set.tasks:
        mixture = WorldMixture(
            [{"task": task, "domain": eval_set.domain}],
            seed=SEED,
            epoch_size=num_scenes,
            split="val",
            size=eval_set.size,
            options=eval_set.options,
        )
        made = (make(mixture.read(ref)) for ref in mixture.order())
        examples = [one for each in made for one in (each if isinstance(each, list) else [each])]
        found[task] = _score(model, examples, max(model.tokenizer.pad_id, 0))
    return found


@torch.no_grad()
def _score(model: SphinxModel, examples: Sequence[Example], pad_id: int) -> TaskMetrics:
    losses: list[Tensor] = []
    rights: list[Tensor] = []
    exact: list[bool] = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = collate_padded(examples[start : start + BATCH_SIZE], pad_id)
        logits = model(batch.token_ids, batch.pixels, batch.image_rows)[:, :-1].float()
        labels = batch.labels[:, 1:]
        is_answer = labels != IGNORE_INDEX
        right = (logits.argmax(-1) == labels) | ~is_answer
        losses.append(torch.nn.functional.cross_entropy(logits[is_answer], labels[is_answer], reduction="none"))
        rights.append(right[is_answer])
        exact += right.all(dim=1).tolist()
    return TaskMetrics(
        loss=torch.cat(losses).double().mean().item(),
        token_accuracy=torch.cat(rights).double().mean().item(),
        exact=fmean(exact),
    )


def summarize(eval_set: EvalSet, found: Mapping[str, TaskMetrics]) -> dict[str, float]:
    """The unweighted means over the tasks, as ``name.loss``, ...; for plain text its perplexity.

    Args:
        eval_set: The questions.
        found: The metrics by task.
    """
    if eval_set.tasks == (TEXT_TASK,):
        return {f"{eval_set.name}.perplexity": math.exp(found[TEXT_TASK].loss)}
    return {
        f"{eval_set.name}.{score}": fmean(getattr(metrics, score) for metrics in found.values())
        for score in ("loss", "token_accuracy", "exact")
    }
