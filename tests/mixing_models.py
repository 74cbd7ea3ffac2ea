"""Checkpoints for the tests of mix, diff and delta, of the functions and of the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sphinxkit import checkpoint
from sphinxkit.tensor_source import MappingSource

PERTURBATION = 0.05  # standard deviation: enough to change every logit


def read_all(path: Path, delta: bool = False) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, the unused group included."""
    with checkpoint.open(path, delta=delta) as opened:
        parts = (opened, opened.unused)
        return {key: part.read(key).clone() for part in parts for key in part.keys()}  # noqa: SIM118


def changed(source: Path, target: Path, change: Callable[[str, Tensor], Tensor], **options: object) -> Path:
    """A copy of a checkpoint in which every tensor has been through ``change``."""
    with checkpoint.open(source) as opened:
        changed, unused = (
            MappingSource({key: change(key, part.read(key)) for key in part.keys()})  # noqa: SIM118
            for part in (opened, opened.unused)
        )
        fields: dict[str, object] = {"format": opened.format, "recipe": opened.recipe, **options}
        checkpoint.save(target, changed, unused=unused, tokenizer=opened.tokenizer_path, **fields)  # type: ignore[arg-type]
    return target


def perturbed(source: Path, target: Path, seed: int = 1, **options: object) -> Path:
    """A copy of a checkpoint with noise on every tensor."""
    generator = torch.Generator().manual_seed(seed)

    def change(_: str, tensor: Tensor) -> Tensor:
        return tensor + PERTURBATION * torch.randn(tensor.shape, generator=generator)

    return changed(source, target, change, **options)


def language_model(target: Path, seed: int, layers: int = 2, vocab: int = 40, dim: int = 16, **options: object) -> Path:
    """A small text-only checkpoint in sphinxkit's own layout."""
    shapes: dict[str, tuple[int, ...]] = {"llm.embed_tokens.weight": (vocab, dim)}
    for layer in range(layers):
        start = f"llm.layers.{layer}."
        shapes |= {f"{start}attention.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"{start}attention_norm.weight": (dim,), f"{start}mlp_norm.weight": (dim,)}
        shapes |= {f"{start}mlp.{name}_proj.weight": (4 * dim, dim) for name in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = (dim, 4 * dim)
    shapes |= {"llm.norm.weight": (dim,), "llm.lm_head.weight": (vocab, dim)}
    generator = torch.Generator().manual_seed(seed)
    source = MappingSource({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})
    llm = {"type": "llama", "vocab_size": vocab, "embed_dim": dim, "num_layers": layers, "num_heads": 2}
    recipe = {"kind": "model", "llm": {**llm, "hidden_dim": 4 * dim, **options}, "conversation": "sphinx_v1"}
    return checkpoint.save(target, source, recipe=recipe)
