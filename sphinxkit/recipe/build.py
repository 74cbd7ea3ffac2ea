"""Builds a SphinxModel from a recipe. This is the only module that resolves component names and connects widths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sphinxkit import encoders, formatters, llama, mixers, projectors, tilers
from sphinxkit.errors import DataError, RecipeError, RegistryError, ShapeError
from sphinxkit.recipe.recipe import Recipe, document_to_yaml
from sphinxkit.recipe.schema import WEIGHTS, ComponentSpec, ModelSpec, VisionSpec
from sphinxkit.recipe.weights import encoder_sources, load_encoder_weights
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tensor_files.tokenizer_files import JSON_NAME
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.vision import VisionBranch, VisionTower

Place = Callable[[Callable[[], Any]], Any]
_logger = logging.getLogger(__name__)


def build(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    tokenizer: Tokenizer | None = None,
    weights: Literal["pretrained"] | None = None,
) -> SphinxModel:
    """Build a model from a recipe, with random weights or with encoders that have published ones.

    Args:
        recipe: A shipped name ("sphinx_1k_13b"), a path, a dict or a Recipe, of kind ``model``.
        device: "meta" builds the structure without memory.
        dtype: Dtype of all parameters, or its name such as "bfloat16".
        tokenizer: Tokenizer to use instead of the recipe's.
        weights: "pretrained" loads the encoders from the sources in the recipe's ``weights:`` keys (files or hub); None
            ignores those keys. The language model and the projectors are random either way.

    Raises:
        RecipeError: The recipe is not valid, not of kind ``model``, or says nothing about weights that are asked for.
        ShapeError: The parts do not fit together.
        CheckpointError: Weights cannot be read or do not fit.
        DataError: No such device or dtype, or weights for a model on the meta device.
    """
    found = Recipe.find(recipe).of_kind("model")
    device, dtype = check_place(device, dtype)
    if weights not in (None, encoders.PRETRAINED):
        raise RecipeError(
            f"weights: expected None or {encoders.PRETRAINED!r}, got {weights!r}; sources stand beside the recipe's "
            "encoders"
        )
    if weights is not None and device.type == "meta":
        raise DataError("weights: a model on the meta device holds none; build it on cpu or cuda")

    if device.type == "meta":
        return build_on_meta(found, dtype, tokenizer)

    def place(builder: Callable[[], Any]) -> Any:
        """Construct on the device itself, component by component: only one is ever in the constructor's float32."""
        with torch.device(device):
            return module_of(builder()).to(dtype)

    def place_llm(builder: Callable[[], Any]) -> Any:
        """The largest part goes from meta straight to its dtype."""
        llm: Any = _place_on_meta(builder, dtype).to_empty(device=device)
        llm.init_weights()
        return llm

    model = assemble(found, place, place_llm, tokenizer)
    if model.vision is not None:
        model.vision.init_weights()
    if weights is not None:
        load_encoder_weights(model, found)
        _logger.warning("the language model and the projectors have random weights")
    elif named := [source.type for source in encoder_sources(found) if source.source]:
        _logger.info(
            "weights: of %s ignored, random weights instead; weights='pretrained' reads them", ", ".join(named)
        )
    return model.eval()


def build_vision_tower(document: Mapping[str, Any], embed_dim: int) -> VisionTower:
    """The vision tower of a checkpoint's recipe, with random weights, on torch's default device and in its dtype.

    Args:
        document: Recipe of kind model with vision; it may not name code to import.
        embed_dim: Width of the language model.
    Raises:
        RecipeError: The recipe is not valid, not of kind ``model``, has no vision, or names code.
        ShapeError: The parts do not fit together.
    """
    recipe = Recipe.find(Recipe(document, trusted=False)).of_kind("model")
    spec = ModelSpec.model_validate(recipe.document)
    if spec.vision is None:
        raise RecipeError(f"recipe {recipe.source or recipe.name}: has no vision")
    dtype = torch.get_default_dtype()
    with _NoValues():
        tower = _vision_tower(spec.vision, embed_dim, lambda builder: module_of(builder()).to(dtype))
        tower.init_weights()
    return tower


def build_on_meta(recipe: Recipe, dtype: torch.dtype, tokenizer: Tokenizer | None = None) -> SphinxModel:
    """Build the model on the meta device, to be filled by ``checkpoint.load_into``."""
    place = partial(_place_on_meta, dtype=dtype)
    return assemble(Recipe.find(recipe).of_kind("model"), place, place, tokenizer).eval()


def _place_on_meta(builder: Callable[[], Any], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"), _NoValues():
        return module_of(builder()).to(dtype)


class _NoValues(TorchFunctionMode):
    """Leaves out what only fills a tensor with values: on meta it changes nothing, and torch follows it in Python.

    That alone would import ``torch._dynamo``, which takes longer than to build a model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init names its tensor
        if isinstance(target, Tensor) and target.is_meta and (_only_fills(func) or _only_scales(func, args)):
            return target
        if func in _DRAWS and (made := torch.empty(*args, **kwargs)).is_meta:
            return made
        return func(*args, **kwargs)


def _only_fills(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _FILLS or (name.endswith("_") and getattr(func, "__module__", "") == "torch.nn.init")


def _only_scales(func: Any, args: tuple[Any, ...]) -> bool:
    return func in _PRODUCTS and len(args) == 2 and isinstance(args[1], int | float)


_FILLS = frozenset({"normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_"})
"""What constructors change weights by, in place."""
_DRAWS = (torch.randn, torch.rand)
_PRODUCTS = (Tensor.__mul__, Tensor.__rmul__, Tensor.mul, torch.mul)


def check_place(device: str | torch.device, dtype: torch.dtype | str) -> tuple[torch.device, torch.dtype]:
    """A device that exists and a floating dtype, which may be given by name.

    Raises:
        DataError: One of them is not; the message says what came.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise DataError(f"dtype: expected a floating torch dtype such as torch.bfloat16 or its name, got {dtype!r}")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DataError(f"device: expected cpu, cuda, cuda:N or meta, got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device {device!r}: this machine has no CUDA device that torch {torch.__version__} can use")
    return found, named


def _without(spec: ComponentSpec, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in spec.options.items() if key not in keys}


def _call(builder: Callable[[], Any]) -> Any:
    return builder()


def _at(path: str, place: Place, builder: Callable[[], Any]) -> Any:
    """Build one component; errors name its place in the recipe."""
    try:
        return place(builder)
    except RegistryError as error:
        raise RecipeError(f"{path}: {error}") from error
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from error
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise RecipeError(f"{path}: a tensor has more elements than torch can count") from error


def module_of(part: Any) -> torch.nn.Module:
    """The part itself, if a builder gave a module.

    Raises:
        RegistryError: It gave something else.
    """
    if not isinstance(part, torch.nn.Module):
        raise RegistryError(f"the builder gave {type(part).__name__}, expected a torch.nn.Module")
    return part


def assemble(recipe: Recipe, place: Place, place_llm: Place, tokenizer: Tokenizer | None = None) -> SphinxModel:
    """Put a model together from its parts.

    Args:
        recipe: Of kind ``model``.
        place: Calls a module's builder on the target device and dtype.
        place_llm: The same for the language model.
        tokenizer: Tokenizer to use instead of the recipe's.
    """
    spec = ModelSpec.model_validate(recipe.document)
    llm = _at("llm", place_llm, partial(llama.create, spec.llm.type, **spec.llm.options))
    vision = None if spec.vision is None else _vision_tower(spec.vision, llm.embed_dim, place)
    if tokenizer is None and spec.tokenizer is not None:
        folder = recipe.source.parent if recipe.source else Path()
        tokenizer = Tokenizer(folder / spec.tokenizer)
    if tokenizer is not None and not _fits(tokenizer, llm.vocab_size):
        raise RecipeError(
            f"recipe {recipe.source or recipe.name}: the tokenizer has {tokenizer.vocab_size} pieces, but "
            f"llm.vocab_size is {llm.vocab_size}"
        )
    beyond = [token for token in spec.end_ids if token >= llm.vocab_size]
    if beyond:
        raise RecipeError(f"end_ids: {beyond[0]} is outside the vocabulary of {llm.vocab_size} (llm.vocab_size)")
    template = partial(formatters.create, spec.conversation.type, **spec.conversation.options)
    return SphinxModel(
        llm,
        vision,
        tokenizer=tokenizer,
        conversation=_at("conversation", _call, template),
        end_ids=spec.end_ids,
        recipe_yaml=document_to_yaml(recipe.resolved() | {"tokenizer": None}),
    )


def _fits(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether a model with so many rows can use it: those of a ``tokenizer.json`` are padded as a rule."""
    return tokenizer.vocab_size == rows or (tokenizer.vocab_size < rows and JSON_NAME in tokenizer.files)


def _vision_tower(spec: VisionSpec, embed_dim: int, place: Place) -> VisionTower:
    if spec.tiler is None:
        tiler = tilers.create("grid", rows=1, cols=1, tile_size=spec.image_size, thumbnail=False)
    else:
        tiler = _at("vision.tiler", _call, partial(tilers.create, spec.tiler.type, **spec.tiler.options))
    expected = (spec.image_size, spec.image_size)
    if getattr(tiler, "image_size", expected) != expected:
        raise RecipeError(
            f"vision.tiler: its tiles make an image of {tiler.image_size[0]}x{tiler.image_size[1]}, but "
            f"vision.image_size is {spec.image_size}"
        )
    branches = []
    for index, branch in enumerate(spec.branches):
        path = f"vision.branches[{index}]"
        parts = [
            _at(
                f"{path}.encoders[{position}]",
                place,
                partial(encoders.create, encoder.type, **_without(encoder, "tile_size", WEIGHTS)),
            )
            for position, encoder in enumerate(branch.encoders)
        ]
        widths = [part.embed_dim for part in parts]
        mixer: nn.Module | None = None
        if branch.mixer is not None:
            options = branch.mixer.options
            mixer = _at(f"{path}.mixer", place, partial(mixers.create, branch.mixer.type, embed_dims=widths, **options))
        elif len(parts) > 1:
            raise RecipeError(f"{path}: {len(parts)} encoders ({', '.join(map(str, widths))} wide) need a mixer")
        in_dim = widths[0] if mixer is None else mixer.embed_dim
        options = branch.projector.options
        projector = _at(
            f"{path}.projector",
            place,
            partial(projectors.create, branch.projector.type, in_dim=in_dim, out_dim=embed_dim, **options),
        )
        sizes = [encoder.options.get("tile_size") for encoder in branch.encoders]
        branches.append(VisionBranch(parts, projector, mixer, sizes))
    tower: VisionTower = place(
        lambda: VisionTower(
            branches,
            mixers.create(spec.mixer.type, **spec.mixer.options),
            embed_dim=embed_dim,
            image_size=spec.image_size,
            tiler=tiler,
        )
    )
    return tower
