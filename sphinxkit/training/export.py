"""Exports the trained model for ``sphinxkit.load``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sphinxkit import checkpoint
from sphinxkit.atomic import atomic_directory
from sphinxkit.checkpoint.formats.peft import write_adapter
from sphinxkit.tensor_source import MappingSource
from sphinxkit.training.errors import named_errors
from sphinxkit.training.lora import factors_of, merge_lora
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.step import LossModule


def export(
    path: Path, module: LossModule, plan: TrainPlan, dims: ParallelDims, dtype: torch.dtype, adapter: Path
) -> None:
    """Write the whole model for ``sphinxkit.load``; LoRA updates are merged, and written as a PEFT adapter.

    Args:
        path: Folder to write; an existing one is replaced.
        module: The trained model.
        plan: Holds the LoRA settings.
        dims: Process layout. Every process calls this; the first one writes.
        dtype: Dtype of the written weights.
        adapter: Folder of the adapter; an existing one is replaced.
    Raises:
        CheckpointError, TrainingError: The disk is full or fails.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True) if dims.mesh is not None else None
    tensors: dict[str, Any] = dict(get_model_state_dict(module, options=options))
    with dims.shared_errors():
        if not dims.is_main:
            return
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        model = module.model
        factors = factors_of(tensors)
        if plan.lora is not None:
            tensors = merge_lora(tensors, plan.lora)
        if model.llm.tie_embeddings:
            tensors.pop("llm.lm_head.weight", None)  # is the embedding
        checkpoint.save(
            path,
            MappingSource(tensors),
            dtype=dtype,
            recipe_yaml=model.recipe_yaml,
            tokenizer=None if model.tokenizer is None else model.tokenizer.files,
            overwrite=True,
        )
        if plan.lora is not None:
            with named_errors(adapter), atomic_directory(adapter) as folder:
                write_adapter(
                    folder,
                    factors,
                    num_heads=model.llm.num_heads,
                    num_kv_heads=model.llm.num_kv_heads,
                    has_vision=model.vision is not None,
                    rank=plan.lora.rank,
                    alpha=plan.lora.alpha,
                    base=plan.init_from if isinstance(plan.init_from, str) else "",
                )
