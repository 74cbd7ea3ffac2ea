"""A fingerprint of a model: equal for equal models."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

SAMPLED_VALUES = 64  # of every tensor in a fingerprint: training changes nearly all of them (our choice)


def fingerprint(model: SphinxModel) -> dict[str, str]:
    """Hash sampled values of every tensor, the recipe and the tokenizer.

    Args:
        model: ``SAMPLED_VALUES`` values of every tensor are read, so this takes seconds at most.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLED_VALUES)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    tokenizer = b"" if model.tokenizer is None else b"".join(model.tokenizer.files.values())
    return {
        "weights": digest.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "recipe": hashlib.sha256((model.recipe_yaml or "").encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
    }
