"""Numbers of the language model, compared with the tensors in the files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.keymap import KeyMap
from sphinxkit.checkpoint.sharding import UNFIT
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.lazy import LazySource, LazyTensor
from sphinxkit.tensor_files.tokenizer_files import choose_tokenizer, read_tokenizer_files, tokenizer_size
from sphinxkit.tensor_source import TensorSource

EMBEDDING = "llm.embed_tokens.weight"
HEAD = "llm.lm_head.weight"

LLM_DEFAULTS: dict[str, Any] = {
    **{"max_seq_len": 4096, "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "head_dim": None},
    **{"qkv_bias": False, "qk_norm": False, "sliding_window": None, "tie_embeddings": False, "moe": None},
}
"""Defaults of the builders in ``sphinxkit.llama``, so that a recipe only says what differs; a test compares both."""

BEYOND_LLAMA2 = ("head_dim", "qkv_bias", "qk_norm", "sliding_window", "tie_embeddings")
"""Options that the formats of LLaMA 2's time have no place for."""

LOAD_BALANCING_WEIGHT = 0.01
"""Default of a recipe's ``moe.load_balancing_weight``; a test compares it with ``llama.MoEOptions``."""

NAMED_NUM_HEADS: dict[str, int] = {"llama2_7b": 32, "llama2_13b": 40, "tinyllama_1b": 32}
"""Query heads of the sizes a recipe may name instead of giving numbers; the rest follows from the tensors' shapes."""

_ADAPTERS = re.compile(r"(.*\.)?lora_.*|.*\.lora\..*|(.*\.)?layers\.\d+\.\w+\.(w[qkvo]|w[123])\.bias")
_EXPERTS = re.compile(r".*\.(feed_forward|block_sparse_moe|mlp)\.(experts|shared_expert|gate\.weight|router|w1_gate).*")


def differing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of :data:`LLM_DEFAULTS` that differ from them."""
    found = {key: options[key] for key, default in LLM_DEFAULTS.items() if options.get(key, default) != default}
    is_number = ("rope_theta", "rope_scaling")
    return {key: float(value) if key in is_number and isinstance(value, int) else value for key, value in found.items()}


def full_numbers(llm: Mapping[str, Any], source: TensorSource) -> dict[str, Any]:
    """Every number of the language model, from its recipe and its tensors' shapes.

    Args:
        llm: The recipe's ``llm`` part: ``type: llama`` with numbers, or a named size.
        source: Tensors in canonical names.
    Returns:
        vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, hidden_dim, and what ``LLM_DEFAULTS`` has;
        ``head_dim`` is None where it is ``embed_dim / num_heads``.
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
    router = shapes.get("llm.layers.0.mlp.router.weight")
    needed = {
        "embedding": EMBEDDING,
        "key projection": "llm.layers.0.attention.k_proj.weight",
        "feed-forward layer": "llm.layers.0.mlp." + ("experts.gate_proj" if router else "gate_proj.weight"),
    }
    raise_errors("the language model is incomplete", [f"no {k} ({n})" for k, n in needed.items() if n not in shapes])
    vocab_size, embed_dim = shapes[EMBEDDING]
    first = "llm.layers.0.attention."
    head_dim = shapes.get(f"{first}q_proj.weight", (embed_dim,))[0] // heads
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": len({key.split(".")[2] for key in shapes if key.startswith("llm.layers.")}),
        "num_heads": heads,
        "num_kv_heads": shapes[needed["key projection"]][0] // head_dim,
        "hidden_dim": shapes[needed["feed-forward layer"]][-2],
        **{key: llm.get(key, default) for key, default in LLM_DEFAULTS.items()},
        "head_dim": None if head_dim * heads == embed_dim else head_dim,
        "qkv_bias": f"{first}q_proj.bias" in shapes,
        "qk_norm": f"{first}q_norm.weight" in shapes,
        "tie_embeddings": HEAD not in shapes,
        "moe": None if router is None else _moe_numbers(llm, router[0]),
    }


def _moe_numbers(llm: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    stated = llm.get("moe") or {}
    if "num_experts_per_tok" not in stated:
        raise CheckpointError(
            f"the recipe's llm part {dict(llm)} does not say moe.num_experts_per_tok, which no tensor shows; give it"
        )
    return {"load_balancing_weight": LOAD_BALANCING_WEIGHT, **stated, "num_experts": num_experts}


def embedding_rows(tensors: Mapping[str, LazyTensor]) -> int | None:
    """Rows of the embedding, which is the vocabulary's size; None if there is no embedding."""
    return tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None


def model_recipe(
    llm: Mapping[str, Any],
    vision: Mapping[str, Any] | None = None,
    end_ids: Sequence[int] = (),
    conversation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A recipe of kind model from its parts.

    Args:
        llm: The language model.
        vision: The vision tower; None for a text-only model.
        end_ids: Token ids that end an answer, in addition to end-of-sentence.
        conversation: The template; None: SPHINX's.
    """
    seen = {} if vision is None else {"vision": dict(vision)}
    ends = {"end_ids": list(end_ids)} if end_ids else {}
    return {"kind": "model", **seen, "llm": dict(llm), "conversation": conversation or "sphinx_v1", **ends}


def refuse_unsupported(names: Collection[str], where: str, key_map: KeyMap) -> None:
    """Refuse the tensors of another mixture of experts than Mixtral's, and those of adapters that are not merged.

    Args:
        names: As in the files.
        where: For messages.
        key_map: The format's names.
    Raises:
        CheckpointError: There are some; the message names the first.
    """
    if name := next((name for name in names if _EXPERTS.fullmatch(name) and key_map.to_ours(name) is None), None):
        raise CheckpointError(
            f"{where}: {name!r} belongs to a mixture of experts of another kind than this format holds (mixtral_sparse "
            "in the released layout, Mixtral in Hugging Face's), which is not supported"
        )
    if name := next((name for name in names if _ADAPTERS.fullmatch(name)), None):
        raise CheckpointError(
            f"{where}: {name!r} belongs to adapters (LoRA, biases), which are not supported; merge them into the "
            "weights first, with the program that trained them"
        )


_MAX_MISSING = 1000  # layers whose tensors are looked for, to list what is missing; our choice


def _llm_shapes(llm: Mapping[str, Any], layers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """The tensors of a language model by canonical name: those of ``layers``, and those outside of all layers."""
    dim, heads = llm["embed_dim"], llm["num_heads"]
    hidden, head_dim = llm["hidden_dim"], _head_dim(llm)
    rows, kv_rows = heads * head_dim, (llm.get("num_kv_heads") or heads) * head_dim
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (llm["vocab_size"], dim), "llm.norm.weight": (dim,)}
    if not llm.get("tie_embeddings"):
        expected[HEAD] = (llm["vocab_size"], dim)
    for index in layers:
        layer = f"llm.layers.{index}."
        expected |= {
            f"{layer}attention_norm.weight": (dim,),
            f"{layer}mlp_norm.weight": (dim,),
            f"{layer}attention.q_proj.weight": (rows, dim),
            f"{layer}attention.k_proj.weight": (kv_rows, dim),
            f"{layer}attention.v_proj.weight": (kv_rows, dim),
            f"{layer}attention.o_proj.weight": (dim, rows),
        }
        if moe := llm.get("moe"):
            experts = moe["num_experts"]
            expected[f"{layer}mlp.router.weight"] = (experts, dim)
            names = ("gate_proj", "up_proj", "down_proj")
            expected |= {f"{layer}mlp.experts.{name}": (experts, hidden, dim) for name in names}
        else:
            expected |= {f"{layer}mlp.{name}.weight": (hidden, dim) for name in ("gate_proj", "up_proj")}
            expected[f"{layer}mlp.down_proj.weight"] = (dim, hidden)
        if llm.get("qkv_bias"):
            widths = {"q_proj": rows, "k_proj": kv_rows, "v_proj": kv_rows}
            expected |= {f"{layer}attention.{name}.bias": (width,) for name, width in widths.items()}
        if llm.get("qk_norm"):
            expected |= {f"{layer}attention.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
    return expected


def _head_dim(llm: Mapping[str, Any]) -> int:
    return int(llm.get("head_dim") or llm["embed_dim"] // llm["num_heads"])


def refuse_incomplete(llm: Mapping[str, Any], numbers: Mapping[str, Any], source: TensorSource) -> None:
    """Refuse a language model without some of the tensors that its recipe tells of.

    Numbers are counted on the tensors: written beside what is left, they would describe a smaller model, which loads.

    Args:
        llm: The recipe's ``llm`` part.
        numbers: What :func:`full_numbers` gives.
        source: Tensors in canonical names.
    Raises:
        CheckpointError: Tensors are missing; the message names them.
    """
    layers = range(llm.get("num_layers", numbers["num_layers"]))[:_MAX_MISSING]
    default = LLM_DEFAULTS["tie_embeddings"] if llm.get("type") == "llama" else numbers["tie_embeddings"]
    expected = _llm_shapes({**numbers, "tie_embeddings": llm.get("tie_embeddings", default)}, layers)
    keys = set(source.keys())
    raise_errors("the language model is incomplete", [f"no {name}" for name in expected if name not in keys])


def refuse_options(numbers: Mapping[str, Any], format: str) -> None:
    """Refuse a language model with options that the formats of LLaMA 2's time have no place for.

    Args:
        numbers: What :func:`full_numbers` gives.
        format: The format's name, for the message.
    Raises:
        CheckpointError: It has some; the message names them.
    """
    beyond = [f"{key} {numbers[key]}" for key in BEYOND_LLAMA2 if numbers[key] != LLM_DEFAULTS[key]]
    if isinstance(numbers["rope_scaling"], Mapping):
        beyond.append(f"rope_scaling of type {numbers['rope_scaling'].get('type')}")
    if beyond:
        raise CheckpointError(
            f'format {format!r} has no place for {", ".join(beyond)}; pass format="sphinxkit" or format="hf"'
        )


def llm_errors(llm: Mapping[str, Any], source: TensorSource, file: Path) -> list[str]:
    """What of the language model's tensors contradicts its configuration, one line each.

    Args:
        llm: The recipe's ``llm`` part with its numbers.
        source: Tensors in canonical names.
        file: The configuration file, for messages.
    Raises:
        CheckpointError: The configuration contradicts itself.
    """
    dim, heads = llm["embed_dim"], llm["num_heads"]
    kv_heads = llm.get("num_kv_heads") or heads
    if (dim % heads and not llm.get("head_dim")) or heads % kv_heads:
        raise CheckpointError(f"{file}: {heads} heads and {kv_heads} key-value heads do not divide a width of {dim}")
    keys = set(source.keys())
    layers = {int(key.split(".")[2]) for key in keys if key.startswith("llm.layers.")}
    surplus = sorted(index for index in layers if index >= llm["num_layers"])
    shapes = _llm_shapes(llm, sorted(layers.difference(surplus)))  # not those of layers that a configuration invents
    errors = [
        f"{key} is {list(source.shape(key))}, the configuration asks for {list(shape)}"
        for key, shape in shapes.items()
        if key in keys and source.shape(key) != shape
    ]
    errors += [
        f"{key} exists, the configuration has no such tensor"
        for key in sorted(keys - shapes.keys())
        if key.startswith("llm.layers.") and int(key.split(".")[2]) not in surplus
    ]
    if surplus:
        errors.append(f"tensors of layers {surplus} exist, the configuration has {llm['num_layers']} layers")
    return errors


@dataclass
class Fitting:
    """Gathers what does not fit while a folder is opened, so that one error says everything.

    Attributes:
        folder: For messages.
        key_map: The files' names.
        defer: Whether somebody else raises ``errors``.
        errors: What was found so far.
    """

    folder: Path
    key_map: KeyMap
    defer: bool = False
    errors: list[str] = field(default_factory=list)

    def vocab_size(self, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> int | None:
        """Rows of the embedding; where it is missing, what the configuration or else the tokenizer says."""
        if EMBEDDING in tensors:
            return tensors[EMBEDDING].shape[0]
        stated = config.get("vocab_size")
        if isinstance(stated, int) and stated > 0:
            return stated
        path = choose_tokenizer(self.folder)
        return None if path is None else tokenizer_size(read_tokenizer_files(path), path)

    def _missing(self, llm: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> list[str]:
        return [
            f"{key!r} ({found[0]!r} in the files) is missing"
            for key in _llm_shapes(llm, range(llm["num_layers"])[:_MAX_MISSING])
            if key not in tensors and (found := self.key_map.to_theirs(key))
        ]

    def no_embedding(self, llm: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> str:
        """Says that neither the embedding nor anything else tells the vocabulary's size; notes what else is missing.

        Args:
            llm: The recipe's ``llm`` part but for that size.
            tensors: Under canonical names.
        """
        self.errors += self._missing(llm, tensors)
        found = self.key_map.to_theirs(EMBEDDING)
        return f"there is no embedding ({EMBEDDING!r}, {found[0] if found else EMBEDDING!r} in the files)"

    def compare(self, llm: Mapping[str, Any], tensors: Mapping[str, LazyTensor], config_path: Path) -> None:
        """Compare the language model's tensors with its numbers.

        Args:
            llm: The recipe's ``llm`` part.
            tensors: Under canonical names.
            config_path: Where the numbers are from.
        Raises:
            CheckpointError: Everything that does not fit, what was gathered before too, unless ``defer``.
        """
        unfit = f"{config_path} and the tensors beside it do not fit together"
        what = f"{self.folder}: {UNFIT}" if self.errors else unfit
        self.errors += llm_errors(llm, LazySource(tensors, str(self.folder)), config_path)
        if self.errors and not self.defer:
            self.errors += self._missing(llm, tensors)
            raise_errors(what, self.errors)

    def raise_all(self) -> None:
        """Raise what was gathered, unless ``defer``.

        Raises:
            CheckpointError: There is something.
        """
        if not self.defer:
            raise_errors(f"{self.folder}: {UNFIT}", self.errors)
