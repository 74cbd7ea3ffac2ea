"""The model that a plan trains: built, filled from checkpoints, frozen where it says, shared among the processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.recipe import Recipe, build
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tensor_source import TensorSource
from sphinxkit.tokenizer import Tokenizer
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.lora import add_lora
from sphinxkit.training.parallel import DTYPES, World, materialize, parallelize
from sphinxkit.training.plan import PARTS, TrainPlan
from sphinxkit.training.step import LossModule

_LLM = "llm."
_CHUNK_BYTES = 2**30  # of whole tensors that are spread over processes at a time; our choice


class _Layered:
    """Several checkpoints as one; a later one's tensors cover an earlier one's. Only what a model has is kept."""

    def __init__(self, sources: Sequence[TensorSource], wanted: set[str]) -> None:
        self._owner = {key: source for source in sources for key in source.keys() if key in wanted}  # noqa: SIM118

    def keys(self) -> list[str]:
        return list(self._owner)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._owner[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._owner[key].dtype(key)

    def read(self, key: str) -> Tensor:
        return self._owner[key].read(key)


class _Below:
    """The tensors below a prefix."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source, self._prefix = source, prefix

    def keys(self) -> list[str]:
        return [key.removeprefix(self._prefix) for key in self._source.keys() if key.startswith(self._prefix)]  # noqa: SIM118

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(self._prefix + key)

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._prefix + key)

    def read(self, key: str) -> Tensor:
        return self._source.read(self._prefix + key)


@dataclass(frozen=True)
class Assembly:
    """What a run trains.

    Args:
        module: The loss, sharded among the processes.
        parts: Trained parameters by part; "lora" for low-rank updates.
        random: Names that no checkpoint held.
        num_image_tokens: Slots that one image takes.
    """

    module: LossModule
    parts: dict[str, list[nn.Parameter]]
    random: tuple[str, ...]
    num_image_tokens: int

    @property
    def model(self) -> SphinxModel:
        """The model inside."""
        return self.module.model


def part_parameters(model: SphinxModel) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part (see ``plan.PARTS``)."""
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in PARTS}
    parts["llm"] = list(model.llm.parameters())
    if model.vision is not None:
        parts["tags"] = [model.vision.start_token, model.vision.end_token]
        for branch in model.vision.branches:
            parts["projectors"] += list(branch.projector.parameters())
            parts["encoders"] += [parameter for encoder in branch.encoders for parameter in encoder.parameters()]
    return parts


def choose_trained(model: SphinxModel, plan: TrainPlan) -> dict[str, list[nn.Parameter]]:
    """Freeze everything but the plan's parts, set train and eval modes; trained parameters by part.

    Args:
        model: Changed in place.
        plan: Which parts, and low-rank updates.
    Raises:
        RecipeError: The model has none of the parts, or no layer of that name for low-rank updates.
    """
    lora = [] if plan.lora is None else add_lora(model.llm, plan.lora)
    parts = part_parameters(model)
    if "encoders" in plan.train and model.vision is not None:
        for branch in model.vision.branches:
            for encoder in branch.encoders:
                encoder.trainable = True
    model.train()
    model.requires_grad_(False)
    trained = {name: parts[name] for name in PARTS if name in plan.train}
    trained = {name: parameters for name, parameters in trained.items() if parameters}
    if lora:
        trained["lora"] = lora
    if not trained:
        raise RecipeError("train: nothing of what is named is in the model")
    for parameters in trained.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return trained


def find_recipe(plan: TrainPlan, folder: Path | None = None) -> Recipe:
    """The plan's model recipe; a path may be relative to the plan's own file."""
    return Recipe.find(beside(folder, plan.model) if isinstance(plan.model, str) else plan.model)


def beside(folder: Path | None, name: str) -> str:
    """``name`` below ``folder`` if it exists there, else ``name``."""
    below = None if folder is None else folder / name
    return str(below) if below is not None and below.exists() else name


def assemble(plan: TrainPlan, world: World, folder: Path | None = None) -> Assembly:
    """Build and fill the model, and share it among the processes.

    Args:
        plan: What to train.
        world: The processes.
        folder: That relative paths may be relative to.
    Raises:
        CheckpointError: A checkpoint cannot be read or does not fit.
        TrainingError: No checkpoint holds weights for a frozen encoder or the language model.
        RecipeError: The recipe is not valid.
    """
    recipe = find_recipe(plan, folder)
    with ExitStack() as stack:
        sources = [
            stack.enter_context(checkpoint.open(checkpoint.resolve(beside(folder, path)))) for path in plan.checkpoints
        ]
        tokenizer = None
        if plan.tokenizer is not None:
            tokenizer = Tokenizer(beside(folder, plan.tokenizer))
        elif recipe.document.get("tokenizer") is None:
            path = next((source.tokenizer_path for source in sources if source.tokenizer_path), None)
            tokenizer = None if path is None else Tokenizer(path)
        return _fill(plan, world, recipe, sources, tokenizer)


def _fill(
    plan: TrainPlan, world: World, recipe: Recipe, sources: Sequence[TensorSource], tokenizer: Tokenizer | None
) -> Assembly:
    torch.manual_seed(plan.seed)
    shape = build(recipe, device="meta", tokenizer=tokenizer)
    names = set(shape.state_dict())
    source = _Layered(sources, names)
    missing = sorted(names - set(source.keys()))
    is_random = not sources or any(".encoders." in name for name in missing)
    model = build(recipe, device=world.device if is_random else "meta", dtype=torch.float32, tokenizer=tokenizer)
    if model.tokenizer is None:
        raise RecipeError("tokenizer: neither the plan, nor the model's recipe, nor a checkpoint has one")
    _check_missing(model, missing, plan, has_sources=bool(sources))
    if is_random:
        if sources:
            checkpoint.load_into(model, source, device=world.device, dtype=torch.float32, strict=False)
    else:
        _fill_small_parts(model, source, world.device, plan)
    trained = choose_trained(model, plan)
    if model.vision is not None and "encoders" not in plan.train:
        for branch in model.vision.branches:
            for encoder in branch.encoders:
                encoder.to(DTYPES[plan.dtype])
    module = LossModule(model)
    if world.mesh is None and not is_random:
        checkpoint.load_into(model.llm, _Below(source, _LLM), device=world.device, dtype=torch.float32, strict=False)
    parallelize(module, model.llm, world, plan)
    if world.mesh is not None and not is_random:
        materialize(module, world.device)
        _spread(module, source)
    num_image_tokens = 0 if shape.vision is None else shape.vision.num_tokens
    return Assembly(module, _refreshed(model, trained), tuple(missing), num_image_tokens)


def _check_missing(model: SphinxModel, missing: Sequence[str], plan: TrainPlan, *, has_sources: bool) -> None:
    """Random projectors are what pre-training starts from; random frozen encoders or half a language model are not."""
    if not plan.allow_random_encoders and "encoders" not in plan.train:
        encoders = sorted({name.rpartition(".trunk.")[0] for name in missing if ".encoders." in name})
        if encoders:
            raise TrainingError(
                f"init: no checkpoint holds weights for the frozen {', '.join(encoders)}; name one in init, train the "
                "encoders, or say allow_random_encoders for a test"
            )
    llm = [name for name in missing if name.startswith(_LLM)]
    if has_sources and llm and len(llm) < sum(1 for _ in model.llm.parameters()):
        raise CheckpointError(f"init: the language model is not complete, e.g. {llm[0]} is missing")
    if has_sources and llm and not plan.allow_random_encoders:
        raise TrainingError("init: none of the checkpoints holds a language model")


def _fill_small_parts(model: SphinxModel, source: TensorSource, device: torch.device, plan: TrainPlan) -> None:
    """Everything but the language model is made whole: drawn where no checkpoint has it, then filled."""
    vision = model.vision
    if vision is None:
        return
    for part in [branch.projector for branch in vision.branches]:
        part.to_empty(device=device)
        for layer in part.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
    for name in ("start_token", "end_token"):
        setattr(vision, name, nn.Parameter(torch.empty_like(getattr(vision, name), device=device)))
    vision.init_weights()
    frozen = torch.float32 if "encoders" in plan.train else DTYPES[plan.dtype]
    for index, branch in enumerate(vision.branches):
        for number, encoder in enumerate(branch.encoders):
            below = _Below(source, f"vision.branches.{index}.encoders.{number}.")
            checkpoint.load_into(encoder, below, device=device, dtype=frozen)
        below = _Below(source, f"vision.branches.{index}.projector.")
        checkpoint.load_into(branch.projector, below, device=device, dtype=torch.float32, strict=False)
    for name in ("start_token", "end_token"):
        if f"vision.{name}" in set(source.keys()):
            with torch.no_grad():
                getattr(vision, name).copy_(source.read(f"vision.{name}"))


def _chunks(source: TensorSource) -> Iterator[dict[str, Any]]:
    chunk: dict[str, Any] = {}
    size = 0
    for key in source.keys():  # noqa: SIM118
        if not key.startswith(_LLM):
            continue
        chunk[f"model.{key}"] = source.read(key).float()
        size += chunk[f"model.{key}"].nbytes
        if size > _CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


def _spread(module: LossModule, source: TensorSource) -> None:
    """Every process takes its part of every tensor of the language model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    for chunk in _chunks(source):
        set_model_state_dict(module, chunk, options=options)


def _refreshed(model: SphinxModel, trained: Mapping[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """The trained parameters as sharding left them."""
    if "lora" in trained:
        lora = [parameter for name, parameter in model.llm.named_parameters() if ".lora_" in name]
    now = part_parameters(model)
    return {name: lora if name == "lora" else now[name] for name in trained}
