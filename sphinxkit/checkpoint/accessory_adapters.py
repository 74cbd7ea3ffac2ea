"""Adapters that LLaMA2-Accessory trains: LoRA factors, and biases, beside the language model's matrices.

A matrix ``wq.weight`` has the factors ``wq.lora_a.weight`` (R, in) and ``wq.lora_b.weight`` (out, R); the update is
their product, not scaled. Tensor-parallel shards split a factor as they split the matrix.

Source: LLaMA2-Accessory, accessory/model/peft.py, accessory/model/LLM/llama_ens_peft.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sphinxkit.checkpoint.keymap import KeyMap
from sphinxkit.checkpoint.sharding import MergedTensor, Replicas
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.low_rank import Update

SUFFIX = "_peft"
"""Ends the ``llama_type`` of a model with adapters."""

_FACTOR = re.compile(r"(.*\.(?:w[qkvo]|w[123]))\.lora_([ab])\.weight")
_BIAS = re.compile(r".*\.layers\.\d+\.\w+\.(?:w[qkvo]|w[123])\.bias")

Shard = Mapping[str, StoredTensor]


def take_adapters(
    shards: Sequence[Shard], key_map: KeyMap, replicas: Replicas, where: str
) -> tuple[list[Shard], dict[str, Update]]:
    """Take the adapters out of a checkpoint's tensors; biases that are all zero are left out.

    Args:
        shards: The tensors of each file, in order.
        key_map: The format's names.
        replicas: See :data:`~sphinxkit.checkpoint.sharding.Replicas`.
        where: For messages.
    Returns:
        The other tensors of each file; the update of each matrix, by its canonical name.
    Raises:
        CheckpointError: A bias that is not zero, for which the language model here has no place; a factor without its
            other, or for a matrix that the model does not have.
    """
    names = dict.fromkeys(name for shard in shards for name in shard)
    biases = {name for name in names if _BIAS.fullmatch(name)}
    if tuned := next(
        (n for n in names if n in biases and any(bool(s[n].read().any()) for s in shards if n in s)), None
    ):
        raise CheckpointError(
            f"{where}: {tuned!r} is a tuned bias, for which the language model here has no place; a model that was "
            "tuned with LoRA alone can be read"
        )
    factors = {name: found for name in names if (found := _FACTOR.fullmatch(name))}
    updates: dict[str, Update] = {}
    errors: list[str] = []
    for name in dict.fromkeys(found[1] for found in factors.values()):
        pair = [f"{name}.lora_{letter}.weight" for letter in "ab"]
        ours = key_map.to_ours(f"{name}.weight")
        lacking = [factor for factor in pair if any(factor not in shard for shard in shards)]
        if ours is None:
            errors.append(f"{pair[0]!r}: there is no matrix {name + '.weight'!r}")
        elif lacking:
            errors.append(f"{lacking[0]!r} is missing")
        else:
            split = ours[1].split_dim
            down, up = ([shard[factor] for shard in shards] for factor in pair)
            update = Update(
                MergedTensor(down, 1 if split == 1 else None, replicas=replicas),
                MergedTensor(up, 0 if split == 0 else None, replicas=replicas),
                1.0,
            )
            if len(update.down.shape) != 2 or update.up.shape[1:] != update.down.shape[:1]:
                errors.append(f"{pair[0]!r} is {list(update.down.shape)}, {pair[1]!r} is {list(update.up.shape)}")
            updates[ours[0]] = update
    raise_errors(f"{where}: the LoRA factors cannot be merged", errors)
    rest: list[Shard] = [{n: t for n, t in shard.items() if n not in factors and n not in biases} for shard in shards]
    return rest, updates


def check_updates(updates: Mapping[str, Update], tensors: Mapping[str, MergedTensor], where: str, alone: bool) -> None:
    """Compare updates with the matrices beside them.

    Args:
        updates: By the matrix's canonical name.
        tensors: In the same folder.
        where: For messages.
        alone: Whether the folder is read alone, and not laid over its base.
    Raises:
        CheckpointError: Shapes that differ, or a matrix that lies elsewhere.
    """
    errors = [
        f"{name!r} is {list(tensors[name].shape)}, its LoRA factors make {list(update.shape)}"
        for name, update in updates.items()
        if name in tensors and tensors[name].shape != update.shape
    ]
    raise_errors(f"{where}: the LoRA factors cannot be merged", errors)
    if alone and (lacking := next((name for name in updates if name not in tensors), None)):
        raise CheckpointError(
            f"{where}: holds LoRA factors for {lacking!r} without the matrix; lay the folder over its base: "
            f"open the base with overlay={str(where)!r}"
        )
