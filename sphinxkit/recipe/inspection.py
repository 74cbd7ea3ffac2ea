"""Shows the contents of a checkpoint or a recipe: ``sphinxkit.inspect``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint import Checkpoint
from sphinxkit.checkpoint.llm_config import EMBEDDING
from sphinxkit.errors import CheckpointError, DataError
from sphinxkit.hub import is_hub_path, is_nano
from sphinxkit.recipe.build import build
from sphinxkit.recipe.memory import num_inactive, parts_of
from sphinxkit.recipe.open_checkpoints import Overlay, open_overlaid
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.registry import no_imports
from sphinxkit.tensor_files.tokenizer_files import read_tokenizer_files, tokenizer_size


@dataclass(frozen=True)
class StoredTensors:
    """Contents of a checkpoint's files.

    Attributes:
        tokenizer: Its file or directory; None if there is none.
        vocab_size: Number of its ids.
        format: sphinxkit, sphinx, meta or hf.
        files: Their paths.
        dtypes: Stored dtype -> number of tensors.
        unused: Names of tensors that no part uses; they are kept.
        tensors: Name -> shape of every other tensor.
    """

    tokenizer: str | None
    vocab_size: int | None
    format: str
    files: tuple[str, ...]
    dtypes: dict[str, int]
    unused: tuple[str, ...]
    tensors: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inspection:
    """Description of a model, and of a checkpoint's stored tensors.

    Attributes:
        name: The requested name.
        parts: Each encoder, the projectors, the language model -> number of parameters.
        num_parameters: Of the whole model.
        num_active_parameters: Of these, how many compute a token: a mixture of experts leaves out those not chosen.
        image_size: Side of the square image; None for a text-only model.
        num_views: Views per image.
        num_image_tokens: Tokens per image.
        max_seq_len: Context of the language model in tokens.
        recipe: Recipe with all defaults filled in.
        stored: Stored tensors; None for a recipe.
    """

    name: str
    parts: dict[str, int]
    num_parameters: int
    num_active_parameters: int
    image_size: int | None
    num_views: int
    num_image_tokens: int
    max_seq_len: int
    recipe: dict[str, Any]
    stored: StoredTensors | None = None

    def to_dict(self, tensors: bool = True) -> dict[str, Any]:
        """For JSON; of a checkpoint, ``tensors`` says whether every tensor is listed."""
        said = dataclasses.asdict(self)
        stored = said.pop("stored") or {}
        if not tensors:
            stored.pop("tensors", None)
        return said | stored


def is_checkpoint(name: object) -> bool:
    """Whether a name means a checkpoint rather than a recipe."""
    return isinstance(name, str | Path) and (is_nano(name) or is_hub_path(name) or Path(name).is_dir())


def recipe_of(name: str | Path | Mapping[str, Any] | Recipe, trust: bool = False) -> Recipe:
    """The recipe called ``name``, or that of a checkpoint.

    Args:
        name: As for ``inspect``.
        trust: Whether a checkpoint's recipe may name code to import.
    """
    if isinstance(name, Mapping | Recipe) or not is_checkpoint(name):
        return Recipe.find(name)
    with open_overlaid(name, None) as opened:
        return Recipe.of_checkpoint(opened, trust)


def inspect(
    name: str | Path | Mapping[str, Any] | Recipe,
    *,
    trust: bool = False,
    overlay: Overlay | None = None,
    tokenizer: str | Path | None = None,
) -> Inspection:
    """Inspect a model: parts, parameters and image tokens; for a checkpoint also format, dtypes and tensors.

    Nothing is loaded: the structure is built without memory, and only the headers of files are read.

    Args:
        name: Directory of a checkpoint, ``hf://org/repo``, or a recipe of kind ``model`` (shipped name, path, dict or
            Recipe).
        trust: Whether code that the recipe names (``package.module:builder``) may be imported and called.
        overlay: A tuned directory (or several, the last counts) whose tensors take the place of the checkpoint's.
        tokenizer: File or directory of the tokenizer, where the checkpoint's own does not count.
    Raises:
        CheckpointError: The checkpoint cannot be opened, or the tokenizer does not fit its embedding.
        DataError: ``overlay`` or ``tokenizer`` with a recipe.
        RecipeError: The recipe is not a valid model, or names code without ``trust``.
    """
    stored = name if isinstance(name, str | Path) and is_checkpoint(name) else None
    if stored is None and (overlay is not None or tokenizer is not None):
        raise DataError(f"overlay= and tokenizer= are for checkpoints, {name!s:.80} is a recipe")
    checkpoint = nullcontext() if stored is None else open_overlaid(stored, overlay)
    with nullcontext() if trust else no_imports(), checkpoint as opened:
        recipe = Recipe.find(name) if opened is None else Recipe.of_checkpoint(opened, trust)
        model = build(recipe, device="meta")
        tensors = None if opened is None else _stored(opened, tokenizer)
    vision = model.vision
    total = sum(parameter.numel() for parameter in model.parameters())
    return Inspection(
        name=str(name) if isinstance(name, str | Path) else recipe.name,
        parts={part: sum(p.numel() for p in module.parameters()) for part, module in parts_of(model).items()},
        num_parameters=total,
        num_active_parameters=total - num_inactive(model.llm),
        image_size=None if vision is None else vision.image_size,
        num_views=0 if vision is None else vision.tiler.num_views,
        num_image_tokens=0 if vision is None else vision.num_tokens,
        max_seq_len=model.llm.max_seq_len,
        recipe=recipe.resolved(),
        stored=tensors,
    )


def _stored(opened: Checkpoint, tokenizer: str | Path | None) -> StoredTensors:
    keys = list(opened.keys())
    place = opened.tokenizer_path if tokenizer is None else Path(tokenizer)
    size = None if place is None else tokenizer_size(read_tokenizer_files(place), place)
    rows = opened.shape(EMBEDDING)[0] if EMBEDDING in keys else None
    if size is not None and rows is not None and size > rows:
        raise CheckpointError(f"{place}: the tokenizer has {size} pieces, the embedding {rows} rows")
    return StoredTensors(
        tokenizer=None if place is None else str(place),
        vocab_size=size,
        format=opened.format,
        files=tuple(str(file) for file in opened.files),
        dtypes=dict(Counter(str(opened.dtype(key)).removeprefix("torch.") for key in keys)),
        unused=tuple(opened.unused.keys()),
        tensors={key: tuple(opened.shape(key)) for key in keys},
    )
