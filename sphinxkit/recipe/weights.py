"""Published weights into a model's encoders, as the recipe's ``weights:`` keys say."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit import encoders, hub
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.recipe.schema import ModelSpec
from sphinxkit.sphinx_model import SphinxModel

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


def encoder_sources(recipe: Recipe) -> list[EncoderSource]:
    """The encoders of a recipe of kind ``model`` and what their ``weights:`` say; a path beside the recipe is found."""
    spec = ModelSpec.model_validate(recipe.document)
    folder = recipe.source.parent if recipe.source else Path()
    return [
        EncoderSource(
            i, j, encoder.type, _beside(folder, encoder.options.get("weights")), encoder.options
        )
        for i, branch in enumerate(spec.vision.branches if spec.vision else [])
        for j, encoder in enumerate(branch.encoders)
    ]  # fmt: skip


def _beside(folder: Path, source: str | None) -> str | None:
    if source is None or source == encoders.PRETRAINED or hub.is_hub_path(source):
        return source
    return str(folder / source) if (folder / source).exists() else source


def load_encoder_weights(model: SphinxModel, recipe: Recipe) -> None:
    """Fill a model's encoders as the recipe's ``weights:`` say, and keep the activations that came with them.

    Args:
        model: Built from the recipe, not on the meta device; ``recipe_yaml`` follows the activations.
        recipe: Of kind ``model``.
    Raises:
        RecipeError: No encoder of the recipe has a ``weights:`` key.
        CheckpointError: A source cannot be read or does not fit; the message names the encoder's place.
    """
    sources = encoder_sources(recipe)
    if model.vision is None or not any(source.source for source in sources):
        raise RecipeError(
            f"recipe {recipe.source or recipe.name}: no encoder says where its weights are; write "
            "`weights: pretrained`, a path or hf://org/repo beside its type"
        )
    document = recipe.resolved()
    for place in sources:
        if place.source is None:
            _logger.warning("%s: %s has no weights: in the recipe and keeps random ones", place.path, place.type)
            continue
        encoder: Any = model.vision.branches[place.branch].encoders[place.position]
        try:
            report = encoders.load_weights(encoder, place.source, place.options.get("activation"))
        except CheckpointError as error:
            raise CheckpointError(f"{place.path}: {error}") from error
        options = document["vision"]["branches"][place.branch]["encoders"][place.position]
        if "activation" in options:
            options["activation"] = report.activation
    model.recipe_yaml = Recipe(document | {"tokenizer": None}).to_yaml()
