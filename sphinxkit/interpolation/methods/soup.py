"""Model soups: the mean of all fine-tuned models, or of those that improve a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.interpolation.method import register
from sphinxkit.interpolation.methods.linear import Linear


@register("uniform_soup")
class UniformSoup(Linear):
    """Mean of any number of models. Source: Model soups, arXiv:2203.05482, section 2."""

    takes_weights = False

    def default_weights(self, num_models: int) -> tuple[float, ...]:
        """The same for every model."""
        return tuple(1 / num_models for _ in range(num_models))


def uniform_soup(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Mean of the tensors of several fine-tuned models.

    Args:
        tensors: One or more.
        dtype: Dtype of the result.
    Shape:
        tensors, return: all the same, any
    Raises:
        ShapeError: No tensors, or different shapes.
    Source: Model soups, arXiv:2203.05482, section 2.
    """
    method = UniformSoup()
    return method.apply(tensors, method.default_weights(len(tensors)), dtype=dtype)


class Soup(NamedTuple):
    """Result of a greedy soup."""

    members: tuple[int, ...]
    """Indices of the models in the soup, in the order they were taken."""
    score: float
    """Score of the soup."""


def choose_soup(scores: Sequence[float], score_soup: Callable[[tuple[int, ...]], float]) -> Soup:
    """Greedy choice of the models to average, the best first; a model stays if the soup does not get worse.

    Args:
        scores: Score of each model alone on held-out data; higher is better.
        score_soup: Scores the uniform average of the models with these indices.
    Raises:
        DataError: No models, or a score is not a number.
    Source: Model soups, arXiv:2203.05482, section 2, Recipe 1.
    """
    if not scores:
        raise DataError("a greedy soup needs at least one model")
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise DataError(f"the score of model {index} is not a number")
    first, *others = sorted(range(len(scores)), key=lambda index: -scores[index])
    soup = Soup((first,), scores[first])
    for index in others:
        members = (*soup.members, index)
        score = score_soup(members)
        if score >= soup.score:
            soup = Soup(members, score)
    return soup


def greedy_soup(
    models: Sequence[Mapping[str, Tensor]],
    score: Callable[[Mapping[str, Tensor]], float],
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], Soup]:
    """Average of fine-tuned models, chosen greedily by a score.

    Args:
        models: Tensors by name, the same names in each.
        score: Of a model on held-out data; higher is better.
        dtype: Dtype of the result.
    Shape:
        models, return: the tensors of one name all the same, any
    Returns:
        The averaged tensors and the choice.
    Raises:
        DataError: No models, different names, or a score that is not a number.
        ShapeError: Different shapes.
    Source: Model soups, arXiv:2203.05482, section 2, Recipe 1.
    """
    for index, model in enumerate(models):
        if set(model) != set(models[0]):
            names = sorted(set(model) ^ set(models[0]))
            raise DataError(f"model {index} and model 0 do not hold the same tensors: {', '.join(names[:5])}")

    def average(members: Sequence[int]) -> dict[str, Tensor]:
        return {name: uniform_soup([models[index][name] for index in members], dtype) for name in models[0]}

    soup = choose_soup([score(model) for model in models], lambda members: score(average(members)))
    return average(soup.members), soup
