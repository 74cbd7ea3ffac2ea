"""The language model's numbers: a recipe's ``llm`` part from each format's configuration, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.registry import suggest
from sphinxkit.tensor_source import TensorSource

# Defaults of LLaMA2-Accessory's ModelArgs (accessory/model/LLM/llama.py), which are also those of Meta's files.
META_DEFAULTS: dict[str, Any] = {
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
# Always overridden by the tokenizer and the caller, or about training alone: known, but they decide nothing here.
META_IGNORED = ("vocab_size", "max_batch_size", "max_seq_len", "load_pretrained_visual_encoder", "trainable_mode")

NAMED_NUM_HEADS: dict[str, int] = {"llama2_7b": 32, "llama2_13b": 40, "tinyllama_1b": 32}
"""Query heads of the sizes a recipe may name instead of giving numbers; the rest follows from the tensors' shapes."""

_WHOLE = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
_EXPERTS = re.compile(r".*\.(feed_forward|block_sparse_moe|mlp)\.(experts|gate\.weight|router|w1_gate).*")
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


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


def check_config_keys(config: Mapping[str, Any], known: tuple[str, ...], file: Path) -> None:
    """Refuse keys that nothing here understands.

    Raises:
        CheckpointError: There is one; the message suggests the known one that is closest.
    """
    if moe := next((key for key in config if "moe" in key.lower() or "expert" in key.lower()), None):
        raise CheckpointError(f"{file}: {moe!r}: a mixture-of-experts model, which is not supported yet")
    raise_errors(
        f"{file}: unknown keys",
        [f"{key!r}{suggest(key, known)}" for key in config if key not in known],
    )


def llm_from_meta(config: Mapping[str, Any], file: Path, vocab_size: int) -> dict[str, Any]:
    """The recipe's ``llm`` part from a released ``config.json`` or a ``params.json``.

    Args:
        config: The file's content; keys that are missing take the public implementation's defaults.
        file: For messages.
        vocab_size: Rows of the embedding, which is what counts whatever the file says.
    Raises:
        CheckpointError: Unknown keys, or numbers that are none.
    """
    check_config_keys(config, (*META_DEFAULTS, *META_IGNORED), file)
    values = {**META_DEFAULTS, **{key: value for key, value in config.items() if key in META_DEFAULTS}}
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        is_whole = key in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
        if not (value is None and META_DEFAULTS[key] is None) and not (
            is_number and (not is_whole or value == int(value))
        ):
            raise CheckpointError(
                f"{file}: {key!r} is {value!r}, expected a positive {'whole ' if is_whole else ''}number"
            )
    llm: dict[str, Any] = {
        "type": "llama",
        "vocab_size": vocab_size,
        "embed_dim": values["dim"],
        "num_layers": values["n_layers"],
        "num_heads": values["n_heads"],
        "hidden_dim": ffn_hidden_dim(values["dim"], values["multiple_of"], values["ffn_dim_multiplier"]),
    }
    if values["n_kv_heads"] not in (None, values["n_heads"]):
        llm["num_kv_heads"] = values["n_kv_heads"]
    return {**llm, **_differing(values["norm_eps"], values["rope_theta"], values["rope_scaling"]), "attention": "auto"}


def _differing(norm_eps: float, rope_theta: float, rope_scaling: float | None) -> dict[str, Any]:
    """Options with a default in the builder, where they differ from it."""
    found: dict[str, Any] = {}
    if norm_eps != META_DEFAULTS["norm_eps"]:
        found["norm_eps"] = norm_eps
    if rope_theta != META_DEFAULTS["rope_theta"]:
        found["rope_theta"] = float(rope_theta)
    if rope_scaling is not None:
        found["rope_scaling"] = float(rope_scaling)
    return found


def full_numbers(llm: Mapping[str, Any], source: TensorSource) -> dict[str, Any]:
    """Every number of the language model, from its recipe and its tensors' shapes.

    Args:
        llm: The recipe's ``llm`` part: ``type: llama`` with numbers, or a named size.
        source: Tensors in canonical names.
    Returns:
        vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, hidden_dim, norm_eps, rope_theta, rope_scaling.
    Raises:
        CheckpointError: The number of heads is neither written nor known by name, or tensors are missing.
    """
    heads = llm.get("num_heads", NAMED_NUM_HEADS.get(str(llm.get("type"))))
    if not isinstance(heads, int):
        raise CheckpointError(
            f"the recipe's llm part {dict(llm)} does not say num_heads, which no tensor shows; give it "
            f"(known sizes: {', '.join(NAMED_NUM_HEADS)})"
        )
    shapes = {key: source.shape(key) for key in source.keys()}  # noqa: SIM118 - a TensorSource is no mapping
    needed = {
        "embedding": "llm.embed_tokens.weight",
        "key projection": "llm.layers.0.attention.k_proj.weight",
        "feed-forward layer": "llm.layers.0.mlp.gate_proj.weight",
    }
    raise_errors("the language model is incomplete", [f"no {k} ({n})" for k, n in needed.items() if n not in shapes])
    vocab_size, embed_dim = shapes[needed["embedding"]]
    layers = {key.split(".")[2] for key in shapes if key.startswith("llm.layers.")}
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": len(layers),
        "num_heads": heads,
        "num_kv_heads": shapes[needed["key projection"]][0] // (embed_dim // heads),
        "hidden_dim": shapes[needed["feed-forward layer"]][0],
        "norm_eps": llm.get("norm_eps", META_DEFAULTS["norm_eps"]),
        "rope_theta": llm.get("rope_theta", META_DEFAULTS["rope_theta"]),
        "rope_scaling": llm.get("rope_scaling"),
    }


def meta_from_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` / ``params.json`` of the public implementation's keys.

    Args:
        numbers: What :func:`full_numbers` gives.
    """
    multiple_of, multiplier = ffn_rule(numbers["embed_dim"], numbers["hidden_dim"])
    config: dict[str, Any] = {
        "dim": numbers["embed_dim"],
        "n_layers": numbers["num_layers"],
        "n_heads": numbers["num_heads"],
        "vocab_size": numbers["vocab_size"],
        "multiple_of": multiple_of,
        "norm_eps": numbers["norm_eps"],
    }
    if numbers["num_kv_heads"] != numbers["num_heads"]:
        config["n_kv_heads"] = numbers["num_kv_heads"]
    if multiplier is not None:
        config["ffn_dim_multiplier"] = multiplier
    if numbers["rope_theta"] != META_DEFAULTS["rope_theta"]:
        config["rope_theta"] = numbers["rope_theta"]
    if numbers["rope_scaling"] is not None:
        config["rope_scaling"] = numbers["rope_scaling"]
    return config


def refuse_experts(names: Iterable[str], where: str) -> None:
    """Refuse the tensors of a mixture of experts.

    Args:
        names: As in the files.
        where: For messages.
    Raises:
        CheckpointError: There are some; the message names the first.
    """
    if name := next((name for name in names if _EXPERTS.fullmatch(name)), None):
        raise CheckpointError(
            f"{where}: {name!r} belongs to a mixture-of-experts model (Mixtral and others), which is not supported yet"
        )


def text_recipe(llm: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of kind model without a vision part."""
    return {"kind": "model", "llm": dict(llm), "conversation": "sphinx_v1"}


def llm_shapes(llm: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a language model by canonical name.

    Args:
        llm: The recipe's ``llm`` part with its numbers.
    """
    dim, heads = llm["embed_dim"], llm["num_heads"]
    kv_heads, hidden = llm.get("num_kv_heads", heads), llm["hidden_dim"]
    expected: dict[str, tuple[int, ...]] = {
        "llm.embed_tokens.weight": (llm["vocab_size"], dim),
        "llm.lm_head.weight": (llm["vocab_size"], dim),
        "llm.norm.weight": (dim,),
    }
    for index in range(llm["num_layers"]):
        layer = f"llm.layers.{index}."
        expected |= {
            f"{layer}attention_norm.weight": (dim,),
            f"{layer}mlp_norm.weight": (dim,),
            f"{layer}attention.q_proj.weight": (dim, dim),
            f"{layer}attention.k_proj.weight": (kv_heads * (dim // heads), dim),
            f"{layer}attention.v_proj.weight": (kv_heads * (dim // heads), dim),
            f"{layer}attention.o_proj.weight": (dim, dim),
            f"{layer}mlp.gate_proj.weight": (hidden, dim),
            f"{layer}mlp.up_proj.weight": (hidden, dim),
            f"{layer}mlp.down_proj.weight": (dim, hidden),
        }
    return expected


def llm_faults(llm: Mapping[str, Any], source: TensorSource, file: Path) -> list[str]:
    """What of the language model's tensors contradicts its configuration, one line each.

    Args:
        llm: The recipe's ``llm`` part with its numbers.
        source: Tensors in canonical names.
        file: The configuration file, for messages.
    Raises:
        CheckpointError: The configuration contradicts itself.
    """
    dim, heads = llm["embed_dim"], llm["num_heads"]
    kv_heads = llm.get("num_kv_heads", heads)
    if dim % heads or heads % kv_heads:
        raise CheckpointError(f"{file}: {heads} heads and {kv_heads} key-value heads do not divide a width of {dim}")
    expected = llm_shapes(llm)
    keys = set(source.keys())
    faults = [
        f"{key} is {list(source.shape(key))}, the configuration asks for {list(shape)}"
        for key, shape in expected.items()
        if key in keys and source.shape(key) != shape
    ]
    surplus = sorted(
        {int(k.split(".")[2]) for k in keys if k.startswith("llm.layers.")} - set(range(llm["num_layers"]))
    )
    if surplus:
        faults.append(f"tensors of layers {surplus} exist, the configuration has {llm['num_layers']} layers")
    return faults


def check_llm_shapes(llm: Mapping[str, Any], source: TensorSource, file: Path) -> None:
    """Refuse a configuration that the language model's tensors contradict.

    Args:
        llm: The recipe's ``llm`` part with its numbers.
        source: Tensors in canonical names.
        file: The configuration file, for messages.
    Raises:
        CheckpointError: Every contradiction: the tensor, its shape and what the configuration asks for.
    """
    raise_errors(f"{file} and the tensors beside it do not fit together", llm_faults(llm, source, file))
