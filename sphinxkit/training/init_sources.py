"""Opens the sources in ``init_from``: layered checkpoints, or one source per model part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sphinxkit import checkpoint
from sphinxkit.checkpoint import Checkpoint
from sphinxkit.encoders import PRETRAINED
from sphinxkit.errors import CheckpointError
from sphinxkit.recipe import Recipe
from sphinxkit.recipe.weights import beside, open_encoder_weights, sources_by_part
from sphinxkit.tensor_source import TensorSource, joined

_PARTS: Mapping[str, Callable[[str], bool]] = {
    "llm": lambda name: name.startswith("llm."),
    "encoders": lambda name: ".encoders." in name,
    "projectors": lambda name: ".projector." in name,
    "image_delimiters": lambda name: name in ("vision.start_token", "vision.end_token"),
}
"""Parts that ``init_from`` may name, and whether a tensor belongs to one."""


@dataclass(frozen=True)
class InitSources:
    """Sources of a run's initial weights.

    Args:
        sources: Checkpoints in order; later tensors override earlier ones.
        tokenizer_path: Tokenizer of the first checkpoint that has one.
        recipe: The model's recipe, with the activations that its encoders' weights require.
    """

    sources: tuple[TensorSource, ...]
    tokenizer_path: Path | None
    recipe: Recipe


def open_init_sources(
    init_from: str | Sequence[str] | Mapping[str, str] | None, recipe: Recipe, folder: Path | None, stack: ExitStack
) -> InitSources:
    """Open the sources of a plan's initial weights.

    Args:
        init_from: The plan's ``init_from``.
        recipe: The model's recipe.
        folder: Base folder of relative paths.
        stack: Keeps the files open until it exits.
    Raises:
        CheckpointError: A source cannot be read, does not fit, or has no weights of its part.
        RecipeError: A part that the model does not have.
    """
    if isinstance(init_from, Mapping):
        return _open_by_part(init_from, recipe, folder, stack)
    paths = [init_from] if isinstance(init_from, str) else list(init_from or [])
    opened = [_open(path, folder, stack) for path in paths]
    return InitSources(tuple(opened), _first_tokenizer(opened), recipe)


def _open(path: str, folder: Path | None, stack: ExitStack) -> Checkpoint:
    return stack.enter_context(checkpoint.open(checkpoint.resolve(beside(folder, path))))


def _first_tokenizer(opened: Iterable[Checkpoint]) -> Path | None:
    return next((found.tokenizer_path for found in opened if found.tokenizer_path), None)


def _open_by_part(init_from: Mapping[str, str], recipe: Recipe, folder: Path | None, stack: ExitStack) -> InitSources:
    places = sources_by_part(init_from, recipe, folder)
    sources: list[TensorSource] = []
    opened: list[Checkpoint] = []
    for part, selects in _PARTS.items():
        source = init_from.get(part)
        if source is None or (part == "encoders" and source == PRETRAINED):
            continue
        opened.append(_open(source, folder, stack))
        found = joined([opened[-1]], selects)
        if not found.keys():
            raise CheckpointError(f"init_from.{part}: {source} holds nothing of it")
        sources.append(found)
    chosen = [place for place in places if place.source]
    if chosen:
        weights = open_encoder_weights(chosen)
        sources.append(weights.tensors)
        recipe = Recipe(weights.followed(recipe.resolved()), recipe.source, recipe.trusted)
    return InitSources(tuple(sources), _first_tokenizer(opened), recipe)
