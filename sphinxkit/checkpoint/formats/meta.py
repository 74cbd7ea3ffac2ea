"""Meta's layout of Llama: ``consolidated.NN.pth`` and ``params.json``.

The released SPHINX files keep their language model the same way, so its names and numbers stand here for both. A
mixture of experts (``mixtral_sparse``) has its own defaults. Each of its shards holds a slice of every expert.

Source: meta-llama/llama, llama/model.py (names); LLaMA2-Accessory, accessory/model/LLM/llama.py (numbers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.llm_config import (
    EMBEDDING,
    Fitting,
    differing,
    embedding_rows,
    model_recipe,
    refuse_unsupported,
)
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import MergedTensor, merge_shards
from sphinxkit.checkpoint.verify import torch_files_checks
from sphinxkit.checkpoint.writing import TensorInput, Texts, WriteOptions, json_text, pieces_of, write_torch_shards
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.registry import suggest
from sphinxkit.tensor_files.files import read_json
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.torch_zip import read_torch_file

SHARD_NAME = "consolidated.{:02d}.pth"
PARAMS_NAME = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_FLAT = re.compile(r"(.*layers\.\d+\.feed_forward\.)w[123]")  # without ".weight"

# Defaults of LLaMA2-Accessory's ModelArgs (accessory/model/LLM/llama.py), which are also those of Meta's files.
_DEFAULTS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_MOE_DEFAULTS: dict[str, Any] = {
    **{"dim": 4096, "hidden_dim": 16384, "n_layers": 32, "n_heads": 32, "n_kv_heads": None, "norm_eps": 1e-5},
    **{"rope_theta": 1000000.0, "rope_scaling": None, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
}
"""Defaults of ``mixtral_sparse*`` (accessory/model/LLM/mixtral_sparse.py, ModelArgs), but for the weight below."""
BALANCE_WEIGHTS = {"mixtral_sparse": 0.1, "mixtral_sparse_ens": 0.1, "mixtral_sparse_ens5": 0.01}
"""Default of ``load_balancing_weight`` by ``llama_type``. Source: the file of each type, ModelArgs."""
_UNREAD = ("head_dim",)  # of a mixture of experts: dim / n_heads counts
# Always overridden by the tokenizer and the caller, or about training alone: known, but they decide nothing here.
_IGNORED = (
    *("vocab_size", "max_batch_size", "max_seq_len", "load_pretrained_visual_encoder", "trainable_mode"),
    *("lora_rank", "bias_tuning"),  # the tensors tell
)
_WHOLE = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "hidden_dim")
_SHARED = ("norm_eps", "rope_theta", "rope_scaling")  # called the same in a recipe
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


def llama_rules(prefix: str) -> list[NameRule]:
    """Names of the language model with ``prefix`` in front, in Meta's and the released files."""
    layer, ours = f"{prefix}layers.{{}}.", "llm.layers.{}."
    return [
        NameRule(f"{prefix}tok_embeddings.weight", "llm.embed_tokens.weight", 1),
        NameRule(f"{layer}attention.wq.weight", f"{ours}attention.q_proj.weight", 0),
        NameRule(f"{layer}attention.wk.weight", f"{ours}attention.k_proj.weight", 0),
        NameRule(f"{layer}attention.wv.weight", f"{ours}attention.v_proj.weight", 0),
        NameRule(f"{layer}attention.wo.weight", f"{ours}attention.o_proj.weight", 1),
        NameRule(f"{layer}feed_forward.w1.weight", f"{ours}mlp.gate_proj.weight", 0),
        NameRule(f"{layer}feed_forward.w2.weight", f"{ours}mlp.down_proj.weight", 1),
        NameRule(f"{layer}feed_forward.w3.weight", f"{ours}mlp.up_proj.weight", 0),
        NameRule(f"{layer}feed_forward.gate.weight", f"{ours}mlp.router.weight"),
        NameRule(f"{layer}feed_forward.w1", f"{ours}mlp.experts.gate_proj", 1, is_flat=True),
        NameRule(f"{layer}feed_forward.w2", f"{ours}mlp.experts.down_proj", 1, is_flat=True),
        NameRule(f"{layer}feed_forward.w3", f"{ours}mlp.experts.up_proj", 1, is_flat=True),
        NameRule(f"{layer}attention_norm.weight", f"{ours}attention_norm.weight"),
        NameRule(f"{layer}ffn_norm.weight", f"{ours}mlp_norm.weight"),
        NameRule(f"{prefix}norm.weight", "llm.norm.weight"),
        NameRule(f"{prefix}output.weight", "llm.lm_head.weight", 0),
    ]


def meta_key_map() -> KeyMap:
    """Names of Meta's ``consolidated.NN.pth``."""
    return KeyMap(llama_rules(""), derived=[r"rope\.freqs", r"layers\.\d+\.attention\.inner_attention\.rope\.freqs"])


def unpack_experts(shards: Sequence[Mapping[str, StoredTensor]]) -> list[dict[str, StoredTensor]]:
    """The shards with experts' matrices (experts, rows, D) in place of (experts * rows, D).

    Args:
        shards: The tensors of each file; the router beside a matrix tells the number of experts.
    Shape:
        shards: (experts * rows, D)
        return: (experts, rows, D)
    Raises:
        CheckpointError: The rows cannot be divided among the experts.
    """
    return [{name: _unpacked(tensor, shard) for name, tensor in shard.items()} for shard in shards]


def _unpacked(tensor: StoredTensor, shard: Mapping[str, StoredTensor]) -> StoredTensor:
    match = _FLAT.fullmatch(tensor.name)
    router = shard.get(f"{match[1]}gate.weight") if match else None
    if router is None or len(tensor.shape) != 2 or not router.shape:
        return tensor
    experts, (rows, width) = router.shape[0], tensor.shape
    if not experts or rows % experts:
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} has {rows} rows, which {experts} experts cannot share")
    shape = (experts, rows // experts, width)
    return replace(tensor, shape=shape, view=lambda: tensor.view().view(shape))


def has_experts(names: Iterable[str]) -> bool:
    """Whether tensors of a mixture of experts are among names of Meta's or the released files."""
    return any(_FLAT.fullmatch(name) for name in names)


def ffn_hidden_dim(embed_dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """Width of the feed-forward layer: two thirds of four times the width, scaled, rounded up.

    Args:
        embed_dim: Width of the model.
        multiple_of: What the result is rounded up to a multiple of.
        ffn_dim_multiplier: Factor applied before rounding up; None for none.
    Source: LLaMA2-Accessory, accessory/model/LLM/llama.py, FeedForward.
    """
    hidden = int(2 * 4 * embed_dim / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def ffn_rule(embed_dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """A ``(multiple_of, ffn_dim_multiplier)`` with which :func:`ffn_hidden_dim` gives ``hidden_dim``.

    Args:
        embed_dim: Width of the model.
        hidden_dim: Width of the feed-forward layer.
    """
    for multiple in _MULTIPLES:
        if ffn_hidden_dim(embed_dim, multiple) == hidden_dim:
            return multiple, None
    return 1, (hidden_dim + 0.5) / int(2 * 4 * embed_dim / 3)


def llm_from_meta(
    config: Mapping[str, Any], file: Path, vocab_size: int, balance_weight: float | None = None
) -> dict[str, Any]:
    """The recipe's ``llm`` part from a released ``config.json`` or a ``params.json``.

    Args:
        config: The file's content; keys that are missing take the public implementation's defaults.
        file: For messages.
        vocab_size: Rows of the embedding; overrides the file.
        balance_weight: Default of ``load_balancing_weight``, for a mixture of experts; None for one feed-forward layer.
    Raises:
        CheckpointError: Unknown keys, or numbers that are none.
    """
    if balance_weight is None:
        if moe := next((key for key in config if "moe" in key.lower() or "expert" in key.lower()), None):
            raise CheckpointError(f"{file}: {moe!r}: a mixture of experts, but the files hold none, or another type's")
        defaults = _DEFAULTS
    else:
        defaults = {**_MOE_DEFAULTS, "load_balancing_weight": balance_weight}
    known = (*defaults, *_IGNORED, *(() if balance_weight is None else _UNREAD))
    raise_errors(
        f"{file}: unknown keys", [f"{key!r}{suggest(key, known, config)}" for key in config if key not in known]
    )
    values = {**defaults, **{key: value for key, value in config.items() if key in defaults}}
    moe_numbers = _checked_moe(values.pop("moe", None), values.pop("load_balancing_weight", None), file)
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**63
        is_whole = key in _WHOLE
        if value is None and defaults[key] is None:
            continue
        if not is_number or (is_whole and value != int(value)):
            raise CheckpointError(
                f"{file}: {key!r} is {value!r}, expected a positive {'whole ' if is_whole else ''}number"
            )
    llm: dict[str, Any] = {
        "type": "llama",
        "vocab_size": vocab_size,
        "embed_dim": values["dim"],
        "num_layers": values["n_layers"],
        "num_heads": values["n_heads"],
        "hidden_dim": values["hidden_dim"]
        if moe_numbers
        else ffn_hidden_dim(values["dim"], values["multiple_of"], values["ffn_dim_multiplier"]),
    }
    if values["n_kv_heads"] not in (None, values["n_heads"]):
        llm["num_kv_heads"] = values["n_kv_heads"]
    return {**llm, **differing({key: values[key] for key in _SHARED}), **moe_numbers, "attention": "auto"}


def _checked_moe(moe: Any, balance_weight: Any, file: Path) -> dict[str, Any]:
    """The recipe's ``moe`` from a configuration's; nothing for a model without experts."""
    if balance_weight is None and moe is None:
        return {}
    names = ("num_experts", "num_experts_per_tok")
    if not isinstance(moe, Mapping) or sorted(moe) != sorted(names):
        raise CheckpointError(f"{file}: 'moe' is {moe!r}, expected an object with {' and '.join(names)}")
    wrong = [name for name in names if not isinstance(moe[name], int) or isinstance(moe[name], bool) or moe[name] < 1]
    if wrong or moe["num_experts_per_tok"] > moe["num_experts"]:
        raise CheckpointError(f"{file}: 'moe' is {moe!r}, expected whole numbers, num_experts the larger one")
    if not isinstance(balance_weight, int | float) or isinstance(balance_weight, bool) or balance_weight < 0:
        raise CheckpointError(f"{file}: 'load_balancing_weight' is {balance_weight!r}, expected a number")
    return {"moe": {**{name: moe[name] for name in names}, "load_balancing_weight": float(balance_weight)}}


def read_llm(
    fitting: Fitting,
    tensors: Mapping[str, MergedTensor],
    config: Mapping[str, Any],
    file: Path,
    balance_weight: float | None = None,
) -> dict[str, Any] | str:
    """The recipe's ``llm`` part from a configuration, compared with the tensors; a string says why there is none.

    Args:
        fitting: Of the folder; takes what does not fit.
        tensors: Under canonical names.
        config: The file's content.
        file: For messages.
        balance_weight: See :func:`llm_from_meta`.
    Raises:
        CheckpointError: Unknown keys, numbers that are none, or (unless deferred) tensors that do not fit.
    """
    vocab_size = fitting.vocab_size(tensors, config)
    if vocab_size is None:
        fitting.raise_all()
        return fitting.no_embedding(llm_from_meta(config, file, 1, balance_weight), tensors)
    llm = llm_from_meta(config, file, vocab_size, balance_weight)
    fitting.compare(llm, tensors, file)
    return llm


def meta_from_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` / ``params.json`` of the public implementation's keys.

    Args:
        numbers: What :func:`~sphinxkit.checkpoint.llm_config.full_numbers` gives.
    """
    config: dict[str, Any] = {
        "dim": numbers["embed_dim"],
        "n_layers": numbers["num_layers"],
        "n_heads": numbers["num_heads"],
        "vocab_size": numbers["vocab_size"],
        "norm_eps": numbers["norm_eps"],
    }
    if numbers["num_kv_heads"] != numbers["num_heads"]:
        config["n_kv_heads"] = numbers["num_kv_heads"]
    moe = numbers["moe"]
    if moe is not None:
        config["hidden_dim"] = numbers["hidden_dim"]
        config["moe"] = {key: moe[key] for key in ("num_experts_per_tok", "num_experts")}
        config["load_balancing_weight"] = moe["load_balancing_weight"]
    else:
        config["multiple_of"], multiplier = ffn_rule(numbers["embed_dim"], numbers["hidden_dim"])
        if multiplier is not None:
            config["ffn_dim_multiplier"] = multiplier
    if moe is not None or numbers["rope_theta"] != _DEFAULTS["rope_theta"]:  # the default differs between types
        config["rope_theta"] = numbers["rope_theta"]
    if numbers["rope_scaling"] is not None:
        config["rope_scaling"] = numbers["rope_scaling"]
    return config


def _check_shard_count(folder: Path, shape: tuple[int, ...], found: int) -> None:
    """Refuse a folder without its last shards, which the files' names do not tell but a slice (D / shards, D) does."""
    is_slice = len(shape) == 2 and shape[0] and not shape[1] % shape[0]
    count = shape[1] // shape[0] if is_slice else found
    if count > found:
        missing = ", ".join(SHARD_NAME.format(rank) for rank in range(found, count))
        raise CheckpointError(f"{folder}: holds {found} of {count} shards; missing {missing}; fetch them")


def find_meta_shards(folder: Path) -> list[Path]:
    """The ``consolidated.NN.pth`` files of a folder, in order; empty if there are none.

    Raises:
        CheckpointError: A number before the last one is missing.
    """
    numbered = {int(m.group(1)): path for path in folder.iterdir() if (m := _SHARD.fullmatch(path.name))}
    if not numbered:
        return []
    missing = [SHARD_NAME.format(rank) for rank in range(max(numbered)) if rank not in numbered]
    raise_errors(f"{folder}: shards are missing; fetch them", missing)
    return [numbered[rank] for rank in sorted(numbered)]


def _split_dim(dim: int | None, rule: NameRule, stored: StoredTensor) -> int | None:
    """Llama 3 splits the embedding along the vocabulary, Llama 1 and 2 along the width; the shape tells."""
    if rule.ours == EMBEDDING and dim is not None and len(stored.shape) == 2 and stored.shape[1] == dim:
        return 0
    return rule.split_dim


@register("meta")
class Meta(Format):
    """Meta's layout of a language model."""

    name = "meta"
    looks_like = "consolidated.NN.pth"
    is_text_only = True
    has_shards = True
    tokenizer_may_lie_above = True

    def detect(self, folder: Path) -> bool:
        """Whether the folder has ``consolidated.NN.pth`` files."""
        return bool(find_meta_shards(folder))

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder with ``consolidated.NN.pth`` and, for a recipe, ``params.json``.

        Raises:
            CheckpointError: Damaged or missing files, names or shapes that do not fit, a tokenizer of the wrong size.
        """
        files = find_meta_shards(folder)
        if not files:
            raise CheckpointError(f"{folder}: no consolidated.NN.pth in it")
        path = folder / PARAMS_NAME
        params = read_json(path) if path.is_file() else None
        if params is not None and params.pop("use_scaled_rope", False):
            raise CheckpointError(f"{path}: use_scaled_rope (Llama 3.1's rotary scaling) is not supported yet")
        dim = params.get("dim") if params is not None else None
        if dim is not None and not isinstance(dim, int):
            raise CheckpointError(f"{path}: 'dim' is {dim!r}, expected a positive whole number")
        shards = unpack_experts([read_torch_file(file) for file in files])
        refuse_unsupported([name for shard in shards for name in shard], str(files[0]), meta_key_map())
        if (query := shards[0].get("layers.0.attention.wq.weight")) is not None:
            _check_shard_count(folder, query.shape, len(files))
        fitting = Fitting(folder, meta_key_map(), options.defer_errors)
        split_dim = partial(_split_dim, dim)
        merged, _ = merge_shards(
            folder, unpack_experts(shards), fitting.key_map, options.replicas, split_dim, fitting.errors
        )
        recipe: dict[str, Any] | str
        if params is None:
            fitting.raise_all()
            recipe = f"there is no {PARAMS_NAME}, so the model's numbers are not known; give a recipe"
        else:
            balance_weight = BALANCE_WEIGHTS["mixtral_sparse"] if has_experts(shards[0]) else None
            llm = read_llm(fitting, merged, params, path, balance_weight)
            recipe = llm if isinstance(llm, str) else model_recipe(llm)
        return Checkpoint(
            folder,
            self.name,
            merged,
            files,
            recipe=recipe,
            tokenizer_path=self.tokenizer(folder, embedding_rows(merged)),
            metadata={"config": params, "num_shards": len(files)},
            checks=partial(torch_files_checks, files),
            key_map=fitting.key_map,
            errors=fitting.errors,
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write ``consolidated.NN.pth`` and ``params.json``."""
        numbers = self.numbers(source, options.recipe)
        count = options.num_shards
        paths = [folder / SHARD_NAME.format(rank) for rank in range(count)]
        write_torch_shards(paths, source, pieces_of(source, meta_key_map(), count), None, None)
        return {PARAMS_NAME: json_text(meta_from_numbers(numbers))}
