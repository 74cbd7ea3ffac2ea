"""The model of a plan: built once, loaded from checkpoints, frozen and sharded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sphinxkit import checkpoint
from sphinxkit.errors import RecipeError
from sphinxkit.recipe import Recipe, build
from sphinxkit.recipe.inspection import recipe_of
from sphinxkit.recipe.weights import beside
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tensor_source import ModuleSource, NamedSource
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training.init_sources import open_init_sources
from sphinxkit.training.initial_weights import (
    LLM,
    check_missing,
    fill_vision,
    given_updates,
    has_every_part,
    layered,
    spread_language_model,
)
from sphinxkit.training.lora import add_lora, draw_factors, is_factor
from sphinxkit.training.parallel import DTYPES, ParallelDims, check_tensor_parallel
from sphinxkit.training.plan import PARTS, TrainPlan
from sphinxkit.training.sharding import materialize, parallelize
from sphinxkit.training.step import LossModule


@dataclass(frozen=True)
class TrainableModel:
    """The model of a run.

    Args:
        module: The loss module, sharded over the processes.
        parts: Trained parameters by part; "lora" for LoRA factors.
        random: Names of tensors that no checkpoint has.
        num_image_tokens: Tokens of one image.
    """

    module: LossModule
    parts: dict[str, list[nn.Parameter]]
    random: tuple[str, ...]
    num_image_tokens: int

    @property
    def model(self) -> SphinxModel:
        """The model inside."""
        return self.module.model


def part_parameters(model: SphinxModel, names: Iterable[str] = PARTS) -> dict[str, list[nn.Parameter]]:
    """The parameters of some parts; parts that the model lacks are ignored.

    Args:
        model: Sharded or not.
        names: Of ``plan.PARTS``, or "lora".
    """
    vision = model.vision
    branches = [] if vision is None else list(vision.branches)
    parts = {
        "llm": list(model.llm.parameters()),
        "projectors": [parameter for branch in branches for parameter in branch.projector.parameters()],
        "image_delimiters": [] if vision is None else [vision.start_token, vision.end_token],
        "encoders": [p for branch in branches for encoder in branch.encoders for p in encoder.parameters()],
        "lora": [parameter for name, parameter in model.llm.named_parameters() if is_factor(name)],
    }
    return {name: parts[name] for name in names if parts[name]}


def choose_trained(model: SphinxModel, plan: TrainPlan) -> dict[str, list[nn.Parameter]]:
    """Freeze everything except the plan's parts and set train and eval modes.

    Args:
        model: Changed in place.
        plan: Names the parts and LoRA updates, whose factors are not initialised yet.
    Returns:
        The trained parameters by part.
    Raises:
        RecipeError: The model has none of the parts, or no layer of that name for low-rank updates.
    """
    if plan.lora is not None:
        add_lora(model.llm, plan.lora)
    if "encoders" in plan.train and model.vision is not None:
        for branch in model.vision.branches:
            for encoder in branch.encoders:
                encoder.trainable = True
    model.train()
    model.requires_grad_(False)
    names = [name for name in PARTS if name in plan.train]
    trained = part_parameters(model, names if plan.lora is None else [*names, "lora"])
    if not trained:
        raise RecipeError("train: nothing of what is named is in the model")
    for parameters in trained.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return trained


def hold_frozen_in(dtype: torch.dtype, llm: nn.Module) -> None:
    """Hold a language model's frozen weights in the dtype that they are used in; trained ones stay in float32.

    Args:
        dtype: The plan's.
        llm: Changed in place; on any device.
    """
    for parameter in llm.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def find_recipe(plan: TrainPlan, folder: Path | None = None) -> Recipe:
    """The plan's model recipe; where the plan names a checkpoint, that checkpoint's own.

    Args:
        plan: Names it.
        folder: Base folder of a relative path: the folder of the plan's file.
    Raises:
        RecipeError: There is none, or it is not valid.
        CheckpointError: The checkpoint has none.
    """
    return recipe_of(beside(folder, plan.model) if isinstance(plan.model, str) else plan.model)


def build_trainable(plan: TrainPlan, recipe: Recipe, dims: ParallelDims, folder: Path | None = None) -> TrainableModel:
    """Build the model, load its weights and shard it.

    If the checkpoints have a language model and every encoder, it is built on the meta device, so no process ever holds
    the whole language model. Otherwise it is built on the device with random weights.

    Args:
        plan: The training plan.
        recipe: The model's recipe, from ``find_recipe``.
        dims: Process layout.
        folder: Base folder of relative paths.
    Raises:
        CheckpointError: A checkpoint cannot be read or does not fit.
        TrainingError: No checkpoint has weights for a frozen encoder or the language model; or the tensor-parallel size
            does not divide the heads.
        RecipeError: The recipe is not valid.
    """
    with ExitStack() as stack:
        initial = open_init_sources(plan.init_from, recipe, folder, stack)
        recipe = initial.recipe
        tokenizer = None
        if plan.tokenizer is not None:
            tokenizer = Tokenizer(beside(folder, plan.tokenizer))
        elif recipe.document.get("tokenizer") is None:
            path = initial.tokenizer_path
            tokenizer = None if path is None else Tokenizer(path)
        source = layered(initial.sources)
        is_filled = has_every_part(recipe, source)
        torch.manual_seed(plan.seed)
        model = build(recipe, device="meta" if is_filled else dims.device, dtype=torch.float32, tokenizer=tokenizer)
        if model.tokenizer is None:
            raise RecipeError("tokenizer: neither the plan, nor the model's recipe, nor a checkpoint has one")
        llm = model.llm
        check_tensor_parallel(plan, llm.num_heads, llm.num_kv_heads)
        names = set(model.state_dict())
        source = source.among(names)
        tied = names - set(ModuleSource(model).keys())  # whose weights come under another name
        missing = sorted(names - tied - set(source.keys()))
        check_missing(model, missing, plan, has_sources=bool(initial.sources))
        return _fill(model, source, tuple(missing), plan, dims, is_filled=is_filled)


def _fill(
    model: SphinxModel,
    source: NamedSource,
    missing: tuple[str, ...],
    plan: TrainPlan,
    dims: ParallelDims,
    *,
    is_filled: bool,
) -> TrainableModel:
    if is_filled:
        fill_vision(model, source, dims.device, plan)
    elif source.keys():
        checkpoint.load_into(model, source, device=dims.device, dtype=torch.float32, strict=False)
    trained = choose_trained(model, plan)
    hold_frozen_in(DTYPES[plan.dtype], model.llm)
    if model.vision is not None and "encoders" not in plan.train:
        for branch in model.vision.branches:
            for encoder in branch.encoders:
                encoder.to(DTYPES[plan.dtype])
    module = LossModule(model)
    is_spread = is_filled and dims.mesh is not None  # each process takes its shards only, after the split
    if not is_spread:
        if is_filled:
            llm = source.below(LLM)  # LoRA factors stay on the meta device
            checkpoint.load_into(model.llm, llm, device=dims.device, dtype=torch.float32, strict=False)
        materialize(module, dims.device)
        draw_factors(model.llm, plan.seed, given_updates(model, plan))
    parallelize(module, model.llm, dims, plan)
    if is_spread:
        materialize(module, dims.device)
        spread_language_model(module, source, plan)
    num_image_tokens = 0 if model.vision is None else model.vision.num_tokens
    return TrainableModel(module, part_parameters(model, trained), missing, num_image_tokens)
