"""Inspects training data: ``sphinxkit.inspect_data``."""

from __future__ import annotations

from collections.abc import Mapping
from glob import has_magic
from pathlib import Path
from typing import Any, get_args

from sphinxkit import checkpoint, formatters
from sphinxkit.data.conversations import OverLength
from sphinxkit.data.inspection import DataInspection, SampleEncoder, inspect_file, inspect_mixture
from sphinxkit.data.mixture import Mixture
from sphinxkit.data.sources import open_source
from sphinxkit.errors import DataError
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.tokenizer import Tokenizer

YAML_SUFFIXES = (".yaml", ".yml")
TEMPLATE = "sphinx_v1"  # of a checkpoint that names none, and without a checkpoint


def inspect_data(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    model: str | Path | None = None,
    count: int = 5,
    start: int = 0,
    epoch: int = 0,
    root: str | Path | None = None,
    max_tokens: int | None = None,
    over_length: OverLength | None = None,
    check_images: bool = True,
) -> DataInspection:
    """Read samples as in training: tokens, labels, and errors of bad samples.

    Args:
        source: A file, folder or glob of samples (JSON lines, tar, Parquet), or a mixture recipe (name or file).
        tokenizer: A ``tokenizer.model``.
        model: Checkpoint whose tokenizer and conversation template are used; without it the template is SPHINX's.
        count: Number of samples.
        start: Index of the first sample (in the file, or in the epoch).
        epoch: Epoch of a mixture.
        root: Base folder of image paths; for a mixture, of all its paths.
        max_tokens: Maximum length of a sample; None: any length.
        over_length: Policy for longer samples; None: the mixture's, else ``error``.
        check_images: Open images; an unreadable image makes a bad sample.
    Returns:
        The samples; of a mixture also its table. A mixture needs neither ``tokenizer`` nor ``model`` for that.
    Raises:
        RecipeError: A recipe of another kind, or not a valid one; or ``source`` is nothing at all.
        DataError: A file cannot be read; there is no tokenizer; ``start`` is after the last sample.
    """
    mixture = open_mixture(source, root)
    if over_length is not None and over_length not in get_args(OverLength):
        raise DataError(f"over_length: expected one of {', '.join(get_args(OverLength))}, got {over_length!r}")
    wanted = over_length or ("error" if mixture is None else mixture.over_length)
    encoder = _encoder(tokenizer, model, max_tokens, wanted, check_images)
    if mixture is not None:
        shown = [] if encoder is None else inspect_mixture(mixture, encoder, epoch=epoch, start=start, count=count)
        return DataInspection(str(source), tuple(shown), mixture=mixture)
    if encoder is None:
        raise DataError(f"{source}: name a tokenizer or a model, so that samples can become tokens")
    file = open_source(source)
    place = None if root is None else Path(root)
    samples = inspect_file(file, encoder, root=place, start=start, count=count)
    return DataInspection(str(source), tuple(samples), num_records=len(file))


def open_mixture(source: str | Path, root: str | Path | None = None) -> Mixture | None:
    """The mixture that a name or a file means, or None for a file of samples.

    Args:
        source: Recipe of kind mixture (name or file), or a file of samples.
        root: Base folder of the mixture's paths; None: the working folder.
    Raises:
        RecipeError: A recipe of another kind, or not a valid one; or ``source`` is nothing at all.
        DataError: One of the mixture's files cannot be read.
    """
    if Path(source).suffix not in YAML_SUFFIXES and (Path(source).exists() or has_magic(str(source))):
        return None
    recipe = Recipe.find(source).of_kind("mixture")
    options = {key: value for key, value in recipe.document.items() if key != "kind"}
    return Mixture(**options | {"folder": str(Path(root or "") / str(options.get("folder", "")))})


def _encoder(
    tokenizer: str | Path | None,
    model: str | Path | None,
    max_tokens: int | None,
    over_length: OverLength,
    opens_images: bool,
) -> SampleEncoder | None:
    if tokenizer is None and model is None:
        return None
    template = formatters.create(TEMPLATE)
    if model is not None:
        with checkpoint.open(checkpoint.resolve(model)) as opened:
            template = _template(opened.recipe)
            tokenizer = tokenizer or opened.tokenizer_path
    if tokenizer is None:
        raise DataError(f"{model} has no tokenizer; pass tokenizer=FILE")
    return SampleEncoder(Tokenizer(Path(tokenizer)), template, max_tokens, over_length, opens_images)


def _template(recipe: Mapping[str, Any]) -> formatters.ConversationTemplate:
    value = recipe.get("conversation") or TEMPLATE
    options = {"type": value} if isinstance(value, str) else dict(value)
    return formatters.create(options.pop("type"), **options)
