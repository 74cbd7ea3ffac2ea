"""Initial weights of a run: layered checkpoints; missing tensors are drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit import checkpoint
from sphinxkit.checkpoint.formats.peft import Adapter
from sphinxkit.errors import CheckpointError
from sphinxkit.recipe import Recipe
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.tensor_files.low_rank import Update
from sphinxkit.tensor_source import NamedSource, TensorSource
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.lora import initial_factors
from sphinxkit.training.parallel import DTYPES
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.step import LossModule

LLM = "llm."
_CHUNK_BYTES = 2**30  # of whole tensors that are spread over processes at a time; our choice


def layered(sources: Iterable[TensorSource]) -> NamedSource:
    """Several checkpoints as one; later tensors override earlier ones."""
    return NamedSource({key: (source, key) for source in sources for key in source.keys()})  # noqa: SIM118


def _encoder_prefixes(recipe: Recipe) -> Iterator[str]:
    vision = recipe.document.get("vision") or {}
    for index, branch in enumerate(vision.get("branches", ())):
        for number in range(len(branch["encoders"])):
            yield f"vision.branches.{index}.encoders.{number}."


def has_every_part(recipe: Recipe, source: NamedSource) -> bool:
    """Whether the checkpoints have at least some tensors of the language model and of every encoder.

    Args:
        recipe: The model's recipe, which lists the encoders.
        source: The checkpoints.
    """
    keys = source.keys()
    return all(any(key.startswith(part) for key in keys) for part in (LLM, *_encoder_prefixes(recipe)))


def check_missing(model: SphinxModel, missing: Sequence[str], plan: TrainPlan, *, has_sources: bool) -> None:
    """Refuse random weights in frozen encoders and in parts of a language model; random projectors are allowed.

    Args:
        model: The model to fill.
        missing: Names of tensors that no checkpoint has.
        plan: Says which parts may be random.
        has_sources: Whether any checkpoint is given.
    Raises:
        TrainingError: A frozen encoder or the language model has no weights.
        CheckpointError: A part of the language model has none.
    """
    if not plan.allow_random_encoders and "encoders" not in plan.train:
        encoders = sorted({name.rpartition(".trunk.")[0] for name in missing if ".encoders." in name})
        if encoders:
            raise TrainingError(
                f"init_from: no checkpoint holds weights for the frozen {', '.join(encoders)}; name one in init_from "
                "(`encoders: pretrained` takes the public ones), train them, or set allow_random_encoders for a test"
            )
    llm = [name for name in missing if name.startswith(LLM)]
    if has_sources and llm and len(llm) < sum(1 for _ in model.llm.parameters()):
        raise CheckpointError(f"init_from: the language model is not complete, e.g. {llm[0]} is missing")
    if has_sources and llm and not plan.allow_random_encoders:
        raise TrainingError("init_from: none of the checkpoints holds a language model")


def fill_vision(model: SphinxModel, source: NamedSource, device: torch.device, plan: TrainPlan) -> None:
    """Materialise the vision tower of a meta-device model: initialise at random, then load the checkpoints.

    Args:
        model: Changed in place.
        source: Must have every encoder; projectors and image delimiters may be missing.
        device: Device of the weights.
        plan: Sets the dtype of frozen encoders.
    Raises:
        CheckpointError: An encoder is not complete, or a shape does not fit.
    """
    vision = model.vision
    if vision is None:
        return
    for projector in [branch.projector for branch in vision.branches]:
        projector.to_empty(device=device)
        for layer in projector.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
    for name in ("start_token", "end_token"):
        setattr(vision, name, nn.Parameter(torch.empty_like(getattr(vision, name), device=device)))
    vision.init_weights()
    frozen = torch.float32 if "encoders" in plan.train else DTYPES[plan.dtype]
    for index, branch in enumerate(vision.branches):
        for number, encoder in enumerate(branch.encoders):
            below = source.below(f"vision.branches.{index}.encoders.{number}.")
            checkpoint.load_into(encoder, below, device=device, dtype=frozen)
        below = source.below(f"vision.branches.{index}.projector.")
        checkpoint.load_into(branch.projector, below, device=device, dtype=torch.float32, strict=False)
    known = set(source.keys())
    for name in ("start_token", "end_token"):
        if f"vision.{name}" in known:
            with torch.no_grad():
                getattr(vision, name).copy_(source.read(f"vision.{name}"))


def given_updates(model: SphinxModel, plan: TrainPlan) -> dict[str, Update] | None:
    """Updates of the adapter that ``lora.init_from`` names, by the weight's name in the language model.

    Args:
        model: Says how many heads there are.
        plan: Holds the LoRA settings.
    Raises:
        CheckpointError: The adapter cannot be read.
    """
    if plan.lora is None or plan.lora.init_from is None:
        return None
    updates, _ = Adapter(plan.lora.init_from).updates(model.llm.num_heads, model.llm.num_kv_heads)
    return {name.removeprefix(LLM): update for name, update in updates.items()}


def spread_language_model(module: LossModule, source: NamedSource, plan: TrainPlan) -> None:
    """Distribute the tensors of the language model and its LoRA factors: every process gets its shards.

    Args:
        module: Sharded and materialised.
        source: Must have the language model.
        plan: Seed or adapter of the LoRA factors.
    Raises:
        CheckpointError: The adapter does not fit.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    llm = source.below(LLM)
    held = ((key, llm.read(key).float()) for key in llm.keys())  # noqa: SIM118
    factors = initial_factors(module.model.llm, plan.seed, given_updates(module.model, plan))
    for chunk in _chunks(chain(held, factors)):
        set_model_state_dict(module, chunk, options=options)


def _chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Any]]:
    chunk: dict[str, Any] = {}
    size = 0
    for key, tensor in tensors:
        chunk[f"model.{LLM}{key}"] = tensor
        size += tensor.nbytes
        if size > _CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk
