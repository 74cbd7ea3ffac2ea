"""Published weights for a model's encoders, as the recipe's ``weights:`` keys say."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sphinxkit import encoders, hub
from sphinxkit.encoders import Encoder, PublishedWeights
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.hub import as_text, is_nano
from sphinxkit.recipe.recipe import Recipe, document_to_yaml
from sphinxkit.recipe.schema import WEIGHTS, ModelSpec
from sphinxkit.registry import suggest
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tensor_source import TensorSource, joined, prefixed

_ASSEMBLY = ("tile_size", WEIGHTS)  # keys beside an encoder that are not its builder's
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder of a recipe has its weights from.

    Args:
        branch: Its branch in the vision tower.
        position: Its place in the branch.
        type: Its registered name.
        source: As ``encoders.load_weights`` takes it; None where the recipe does not say.
        options: Of its builder, as the recipe has them.
    """

    branch: int
    position: int
    type: str
    source: str | None
    options: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Its place in the recipe."""
        return f"vision.branches[{self.branch}].encoders[{self.position}]"

    @property
    def prefix(self) -> str:
        """What is before the names of its tensors in the model."""
        return f"vision.branches.{self.branch}.encoders.{self.position}."

    @property
    def names(self) -> list[str]:
        """What it goes by in ``init_from``, the more particular first: ``timm/MODEL`` and its type."""
        model = self.options.get("model")
        return [f"{self.type}/{model}", self.type] if isinstance(model, str) else [self.type]

    def on_meta(self) -> Encoder:
        """The encoder itself, without memory."""
        with torch.device("meta"):
            return encoders.create(self.type, **self.options)


def encoder_sources(recipe: Recipe) -> list[EncoderSource]:
    """The encoders of a recipe of kind ``model`` and what their ``weights:`` say; a path beside the recipe is found."""
    spec = ModelSpec.model_validate(recipe.document)
    folder = recipe.source.parent if recipe.source else Path()
    found = []
    for i, branch in enumerate(spec.vision.branches if spec.vision else []):
        for j, encoder in enumerate(branch.encoders):
            options = {key: value for key, value in encoder.options.items() if key not in _ASSEMBLY}
            written = encoder.options.get(WEIGHTS)
            source = None if written is None else beside(folder, written)
            found.append(EncoderSource(i, j, encoder.type, source, options))
    return found


def beside(folder: Path | None, name: str) -> str:
    """``name`` below ``folder`` if it exists there, else ``name``: a path, ``hf://...``, ``pretrained`` or ``nano``."""
    is_a_word = name == encoders.PRETRAINED or hub.is_hub_path(name) or is_nano(name)
    if folder is None or is_a_word or not (folder / name).exists():
        return name
    return as_text(folder / name)


PARTS = ("llm", "encoders", "projectors", "image_delimiters")
"""Parts of a model that ``init_from`` may name beside single encoders."""


def check_init_from(recipe: Recipe) -> None:
    """Check that a stage's ``init_from`` names parts that its model has.

    Args:
        recipe: Of kind ``train``.
    Raises:
        RecipeError: It names another, or the model's recipe is not valid.
    """
    init_from, model = recipe.document.get("init_from"), recipe.document["model"]
    if isinstance(init_from, Mapping):
        folder = None if recipe.source is None else recipe.source.parent
        sources_by_part(init_from, Recipe.find_written(_model_beside(folder, model)), folder)


def _model_beside(folder: Path | None, model: Any) -> Any:
    return beside(folder, model) if isinstance(model, str) else model


def sources_by_part(init_from: Mapping[str, str], recipe: Recipe, folder: Path | None) -> list[EncoderSource]:
    """The encoders of a recipe with the sources that ``init_from`` gives them by part.

    An encoder goes by its type, timm's also by ``timm/MODEL``. ``encoders: pretrained`` is every encoder's own
    ``weights:``, or its published ones; what names an encoder itself comes before it.

    Args:
        init_from: Part -> source.
        recipe: Of the model.
        folder: That relative paths may be relative to.
    Returns:
        All encoders; ``source`` is None where the mapping gives none.
    Raises:
        RecipeError: A name that is neither an encoder of the model nor a part.
    """
    places = encoder_sources(recipe)
    known = [*PARTS, *sorted({name for place in places for name in place.names})]
    for part in init_from:
        if part not in known:
            raise RecipeError(
                f"init_from.{part}: expected a part of the model: {', '.join(known)}{suggest(part, known, init_from)}"
            )
    everywhere = init_from.get("encoders") == encoders.PRETRAINED
    found = []
    for place in places:
        given = next((init_from[name] for name in place.names if name in init_from), None)
        if given is None and everywhere:
            given = place.source or encoders.PRETRAINED
        found.append(replace(place, source=None if given is None else beside(folder, given)))
    return found


@dataclass(frozen=True)
class OpenedEncoders:
    """Published weights of encoders, opened and checked, under the model's names.

    Args:
        tensors: All of them.
        activations: What came with the weights, by the encoder's place (branch, position).
    """

    tensors: TensorSource
    activations: Mapping[tuple[int, int], str]

    def followed(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A resolved recipe whose encoders have the activations of their weights."""
        return with_activations(document, self.activations)


def open_encoder_weights(places: Sequence[EncoderSource]) -> OpenedEncoders:
    """Open the weights of encoders without building any of them.

    Args:
        places: Encoders whose ``source`` is given.
    Raises:
        CheckpointError: A source cannot be read or does not fit; the message names the encoder's place.
    """
    parts, activations = [], {}
    for place in places:
        weights = _open(place)
        parts.append(prefixed(weights, place.prefix))
        activations[place.branch, place.position] = weights.report.activation
    return OpenedEncoders(joined(parts), activations)


def _open(place: EncoderSource) -> PublishedWeights:
    try:
        return encoders.open_weights(place.on_meta(), place.source or "", place.options.get("activation"))
    except CheckpointError as error:
        raise CheckpointError(f"{place.path}: {error}") from error


def with_activations(document: Mapping[str, Any], activations: Mapping[tuple[int, int], str]) -> dict[str, Any]:
    """A resolved recipe whose encoders have the activations that came with their weights.

    Args:
        document: As ``Recipe.resolved`` gives it; changed in place.
        activations: By branch and position; an encoder whose builder has no such option is left alone.
    """
    for (branch, position), activation in activations.items():
        options = document["vision"]["branches"][branch]["encoders"][position]
        if "activation" in options:
            options["activation"] = activation
    return dict(document)


def require_sources(recipe: Recipe) -> list[EncoderSource]:
    """The encoders of a recipe.

    Raises:
        RecipeError: None of them has a ``weights:`` key.
    """
    places = encoder_sources(recipe)
    if not any(place.source for place in places):
        raise RecipeError(
            f"recipe {recipe.source or recipe.name}: no encoder says where its weights are; write "
            "`weights: pretrained`, a path or hf://org/repo beside its type"
        )
    return places


def load_encoder_weights(model: SphinxModel, recipe: Recipe) -> None:
    """Fill a model's encoders as the recipe's ``weights:`` say, and keep the activations that came with them.

    Args:
        model: Built from the recipe, not on the meta device; ``recipe_yaml`` follows the activations.
        recipe: Of kind ``model``.
    Raises:
        RecipeError: No encoder of the recipe has a ``weights:`` key.
        CheckpointError: A source cannot be read or does not fit; the message names the encoder's place.
    """
    activations = {}
    for place in require_sources(recipe):
        if place.source is None:
            _logger.warning("%s: %s has no weights: in the recipe and keeps random ones", place.path, place.type)
            continue
        vision: Any = model.vision
        encoder = vision.branches[place.branch].encoders[place.position]
        try:
            report = encoders.load_weights(encoder, place.source, place.options.get("activation"))
        except CheckpointError as error:
            raise CheckpointError(f"{place.path}: {error}") from error
        activations[place.branch, place.position] = report.activation
    document = with_activations(recipe.resolved(), activations)
    model.recipe_yaml = document_to_yaml(document | {"tokenizer": None})
