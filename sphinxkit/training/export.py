"""Exports the trained model for ``sphinxkit.load``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sphinxkit import checkpoint
from sphinxkit.tensor_source import MappingSource
from sphinxkit.training.lora import merge_lora
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.step import LossModule


def export(path: Path, module: LossModule, plan: TrainPlan, dims: ParallelDims, dtype: torch.dtype) -> None:
    """Write the whole model for ``sphinxkit.load``; LoRA updates are merged.

    Args:
        path: Folder to write; an existing one is replaced.
        module: The trained model.
        plan: Holds the LoRA settings.
        dims: Process layout. Every process calls this; the first one writes.
        dtype: Dtype of the written weights.
    Raises:
        CheckpointError: The disk is full or fails.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True) if dims.mesh is not None else None
    tensors: dict[str, Any] = dict(get_model_state_dict(module, options=options))
    failure: Exception | None = None
    if dims.is_main:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if plan.lora is not None:
            tensors = merge_lora(tensors, plan.lora)
        model = module.model
        if model.llm.tie_embeddings:
            tensors.pop("llm.lm_head.weight", None)  # is the embedding
        try:
            checkpoint.save(
                path,
                MappingSource(tensors),
                dtype=dtype,
                recipe_yaml=model.recipe_yaml,
                tokenizer=None if model.tokenizer is None else model.tokenizer.files,
                overwrite=True,
            )
        except Exception as error:
            failure = error
    dims.raise_any(failure)
