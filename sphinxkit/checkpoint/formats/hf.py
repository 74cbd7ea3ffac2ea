"""Hugging Face's layout of Llama's line: ``model*.safetensors`` or ``pytorch_model*.bin`` and ``config.json``.

Source of the names: transformers, models/{llama,mistral,mixtral,qwen2,qwen3}/modeling_*.py. Mixtral's files hold the
matrices of every expert apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.formats.hf_chat_template import known_template
from sphinxkit.checkpoint.formats.hf_companions import GENERATION_CONFIG_NAME, companion_files
from sphinxkit.checkpoint.formats.hf_config import SPHINX, hf_from_numbers, llm_from_hf
from sphinxkit.checkpoint.formats.native import is_native
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.llm_config import (
    EMBEDDING,
    HEAD,
    Fitting,
    embedding_rows,
    model_recipe,
    refuse_unsupported,
)
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import MergedTensor, bitwise_equal
from sphinxkit.checkpoint.verify import torch_files_checks
from sphinxkit.checkpoint.writing import (
    Convert,
    Piece,
    TensorInput,
    Texts,
    WriteOptions,
    json_text,
    pieces_of,
    write_safetensors_shards,
)
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.files import read_json, read_tensor_files
from sphinxkit.tensor_files.lazy import StoredTensor
from sphinxkit.tensor_files.spec import TensorSpec

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
_HF_EMBEDDING, _HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPERT = re.compile(r"(.*\.block_sparse_moe\.experts\.)([0-9]{1,9})\.(w[123])\.weight")
_EXPERTS = re.compile(r"(.*\.block_sparse_moe\.experts\.)(w[123])")
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+(\.safetensors|\.bin)")
_LLAMA_EOS = 2  # transformers' default of eos_token_id, LlamaConfig; it is Llama's tokenizer's own

_HF_LAYER, _OUR_LAYER = "model.layers.{}.", "llm.layers.{}."
_HF_RULES = [
    NameRule("model.embed_tokens.weight", "llm.embed_tokens.weight"),
    NameRule(f"{_HF_LAYER}self_attn.q_proj.weight", f"{_OUR_LAYER}attention.q_proj.weight", rotary="query"),
    NameRule(f"{_HF_LAYER}self_attn.k_proj.weight", f"{_OUR_LAYER}attention.k_proj.weight", rotary="key"),
    NameRule(f"{_HF_LAYER}self_attn.v_proj.weight", f"{_OUR_LAYER}attention.v_proj.weight"),
    NameRule(f"{_HF_LAYER}self_attn.o_proj.weight", f"{_OUR_LAYER}attention.o_proj.weight"),
    NameRule(f"{_HF_LAYER}self_attn.q_proj.bias", f"{_OUR_LAYER}attention.q_proj.bias", rotary="query"),
    NameRule(f"{_HF_LAYER}self_attn.k_proj.bias", f"{_OUR_LAYER}attention.k_proj.bias", rotary="key"),
    NameRule(f"{_HF_LAYER}self_attn.v_proj.bias", f"{_OUR_LAYER}attention.v_proj.bias"),
    NameRule(f"{_HF_LAYER}self_attn.q_norm.weight", f"{_OUR_LAYER}attention.q_norm.weight", rotary="head"),
    NameRule(f"{_HF_LAYER}self_attn.k_norm.weight", f"{_OUR_LAYER}attention.k_norm.weight", rotary="head"),
    NameRule(f"{_HF_LAYER}mlp.gate_proj.weight", f"{_OUR_LAYER}mlp.gate_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.up_proj.weight", f"{_OUR_LAYER}mlp.up_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.down_proj.weight", f"{_OUR_LAYER}mlp.down_proj.weight"),
    NameRule(f"{_HF_LAYER}block_sparse_moe.gate.weight", f"{_OUR_LAYER}mlp.router.weight"),
    *(  # of all experts, which the files hold apart; see join_experts
        NameRule(f"{_HF_LAYER}block_sparse_moe.experts.{theirs}", f"{_OUR_LAYER}mlp.experts.{ours}")
        for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ),
    NameRule(f"{_HF_LAYER}input_layernorm.weight", f"{_OUR_LAYER}attention_norm.weight"),
    NameRule(f"{_HF_LAYER}post_attention_layernorm.weight", f"{_OUR_LAYER}mlp_norm.weight"),
    NameRule("model.norm.weight", "llm.norm.weight"),
    NameRule("lm_head.weight", "llm.lm_head.weight"),
]


def hf_key_map() -> KeyMap:
    """Names of Hugging Face's ``LlamaForCausalLM`` and its descendants."""
    return KeyMap(_HF_RULES, derived=[r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"])


def join_experts(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with one for all experts' matrices, (experts, hidden, D), in place of one for each.

    Args:
        stored: Under the files' names.
    Shape:
        stored: (hidden, D) each; down (D, hidden)
        return: (experts, hidden, D)
    Raises:
        CheckpointError: An expert is missing, or differs in shape or dtype from the first.
    """
    joined: dict[str, StoredTensor] = {}
    groups: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in stored.items():
        if match := _EXPERT.fullmatch(name):
            groups.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            joined[name] = tensor
    for name, group in groups.items():
        parts = [group[expert] for expert in sorted(group)]
        first = parts[0]
        if sorted(group) != list(range(len(group))) or any(
            (part.shape, part.dtype) != (first.shape, first.dtype) or len(part.shape) != 2 for part in parts
        ):
            raise CheckpointError(
                f"{first.file}: {name!r}: experts {sorted(group)} exist, with shapes "
                f"{sorted({part.shape for part in parts})}; expected 0, 1, 2, ... alike"
            )
        is_turned = name.endswith("w2")
        shape = (len(parts), *(reversed(first.shape) if is_turned else first.shape))
        joined[name] = replace(first, name=name, shape=shape, view=partial(_stack, parts, is_turned))
    return joined


def _stack(parts: Sequence[StoredTensor], is_turned: bool) -> Tensor:
    return torch.stack([part.view().t() if is_turned else part.view() for part in parts])


def part_experts(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with one for each expert's matrix in place of one for all.

    Args:
        pieces: From ``pieces_of``.
    """
    parted: list[Piece] = []
    for piece in pieces:
        match = _EXPERTS.fullmatch(piece.spec.name)
        if match is None:
            parted.append(piece)
            continue
        is_turned = match[2] == "w2"
        count, *shape = piece.spec.shape
        shape = shape[::-1] if is_turned else shape
        for expert in range(count):
            spec = TensorSpec(f"{match[1]}{expert}.{match[2]}.weight", tuple(shape), piece.spec.dtype)
            parted.append(Piece(spec, piece.key, None, partial(_take_expert, expert=expert, is_turned=is_turned)))
    return parted


def _take_expert(tensor: Tensor, expert: int, is_turned: bool) -> Tensor:
    return tensor[expert].t().contiguous() if is_turned else tensor[expert]


def rotary_to_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows ordered in halves per head (Hugging Face) to neighbouring pairs (Meta, canonical).

    Args:
        tensor: Weights or bias of a projection, or the weights of a head's norm.
        num_heads: Heads of this projection; 1 for a norm.
    Shape:
        tensor: (num_heads * head_dim, ...)
        return: the same
    Source: transformers, models/llama/convert_llama_weights_to_hf.py, permute (the inverse).
    """
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rotary_to_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`rotary_to_pairs`.

    Args:
        tensor: Weights or bias of a projection, or the weights of a head's norm.
        num_heads: Heads of this projection; 1 for a norm.
    Shape:
        tensor: (num_heads * head_dim, ...)
        return: the same
    """
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rotary(reorder: Callable[..., Tensor], rule: NameRule, num_heads: int, num_kv_heads: int) -> Convert | None:
    """``reorder`` for the tensors that a rule names; None where both sides order their rows alike. Shape: any."""
    if rule.rotary is None:
        return None
    return partial(reorder, num_heads={"query": num_heads, "key": num_kv_heads, "head": 1}[rule.rotary])


def _end_ids(folder: Path, config: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Ids of ``eos_token_id`` (one or a list), where they are others than Llama's own."""
    files = [config]
    if (folder / GENERATION_CONFIG_NAME).is_file():
        files.append(read_json(folder / GENERATION_CONFIG_NAME))
    found: list[int] = []
    for content in files:
        value = content.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if type(token) is int and 0 <= token < vocab_size and token not in found:
                found.append(token)
    return [] if found == [_LLAMA_EOS] else found


@dataclass(frozen=True)
class LanguageModelFolder:
    """What a folder says about its language model, whether its weights are there or not.

    Attributes:
        llm: The recipe's ``llm`` part.
        end_ids: Token ids that end an answer, in addition to end-of-sentence.
        tokenizer: The file of its tokenizer, if there is one.
        conversation: The recipe's template, where the folder has a chat template that is known here.
    """

    llm: dict[str, Any]
    end_ids: tuple[int, ...]
    tokenizer: Path | None
    conversation: dict[str, Any] | None


def read_language_model(folder: Path) -> LanguageModelFolder:
    """Read ``config.json`` and the files beside it, without weights.

    Args:
        folder: With ``config.json``.
    Raises:
        CheckpointError: Damaged files, numbers that cannot be followed, or a tokenizer that does not fit.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise CheckpointError(f"{path}: 'vocab_size' is {vocab_size!r}, expected a number")
    llm = llm_from_hf(config, path, vocab_size)
    ends = tuple(_end_ids(folder, config, vocab_size))
    return LanguageModelFolder(llm, ends, HuggingFace().tokenizer(folder, vocab_size), known_template(folder))


def check_tie(tensors: Mapping[str, MergedTensor], config_path: Path) -> None:
    """Raise where a head that is tied to the embedding differs from it.

    Args:
        tensors: Under canonical names.
        config_path: For the message.
    Raises:
        CheckpointError: It does.
    """
    head, embedding = tensors.get(HEAD), tensors[EMBEDDING]
    if head is not None and not bitwise_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{config_path}: tie_word_embeddings is true, but the files hold a 'lm_head.weight' that differs from "
            f"{_HF_EMBEDDING!r}; set it to false to use the files' own, or take 'lm_head.weight' out of them"
        )


def find_weights(folder: Path) -> Path | None:
    """The weight file of a folder or the index of several (safetensors before .bin); None if there is none."""
    names = ("model.safetensors", "pytorch_model.bin")
    found = [folder / f"{name}{end}" for name in names for end in (".index.json", "")]
    return next((path for path in found if path.is_file()), None)


def missing_index(folder: Path) -> str | None:
    """What to say of a folder whose shards lack their index; None if there are no such shards."""
    shards = [path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)]
    if not shards:
        return None
    index = _SHARD.sub(r"\1\2.index.json", shards[0])
    return f"{folder}: holds {len(shards)} shards without their index; fetch {index}"


@register("hf")
class HuggingFace(Format):
    """Hugging Face's layout of ``LlamaForCausalLM`` and its descendants."""

    name = "hf"
    looks_like = "model.safetensors / pytorch_model.bin with config.json"
    is_text_only = True
    has_options = True
    may_pad_vocabulary = True

    def detect(self, folder: Path) -> bool:
        """Whether the folder has weights and ``config.json``, no sphinxkit index and no vision."""
        names = {path.name for path in folder.iterdir()}
        weights = any(n.startswith("model") and n.endswith((".safetensors", ".safetensors.index.json")) for n in names)
        weights |= any(n.startswith("pytorch_model") and n.endswith((".bin", ".bin.index.json")) for n in names)
        if not weights or CONFIG_NAME not in names or is_native(folder):
            return False
        return read_json(folder / CONFIG_NAME).get("model_type") != SPHINX

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder with weight files and ``config.json``.

        Raises:
            CheckpointError: Damaged or missing files, not a Llama, names or shapes that do not fit.
        """
        weights = find_weights(folder)
        config_path = folder / CONFIG_NAME
        if weights is None and (text := missing_index(folder)):
            raise CheckpointError(text)
        if weights is None or not config_path.is_file():
            raise CheckpointError(f"{folder}: needs model.safetensors or pytorch_model.bin, and {CONFIG_NAME}")
        config = read_json(config_path)
        key_map = hf_key_map()
        tied = {_HF_HEAD} if config.get("tie_word_embeddings") else set()
        stored, files = read_tensor_files(weights, lambda name: name in tied or key_map.is_derived(name))
        stored = join_experts(stored)
        refuse_unsupported(stored, str(folder), key_map)
        if not any(key_map.to_ours(name) for name in stored):
            raise CheckpointError(
                f"{folder}: holds no 'model.embed_tokens.weight', so it is not a Llama in this layout"
            )
        fitting = Fitting(folder, key_map, options.defer_errors)
        embedding = stored.get(_HF_EMBEDDING)
        vocab_size = config.get("vocab_size") if embedding is None else embedding.shape[0]
        llm = llm_from_hf(config, config_path, vocab_size if isinstance(vocab_size, int) else 0)
        heads = llm["num_heads"]
        kv_heads = llm.get("num_kv_heads", heads)
        merged: dict[str, MergedTensor] = {}
        for name, tensor in stored.items():
            if key_map.is_derived(name):
                continue
            found = key_map.to_ours(name)
            if found is None:
                fitting.errors.append(f"{name!r} is not a name this format has")
            else:
                merged[found[0]] = MergedTensor([tensor], reorder=rotary(rotary_to_pairs, found[1], heads, kv_heads))
        if config.get("tie_word_embeddings") and EMBEDDING in merged:
            check_tie(merged, config_path)
            merged.pop(HEAD, None)
        if EMBEDDING not in merged and not fitting.defer:
            fitting.errors.append(f"there is no {_HF_EMBEDDING!r}")
        fitting.compare(llm, merged, config_path)
        return Checkpoint(
            folder,
            self.name,
            merged,
            files,
            recipe=model_recipe(
                llm, end_ids=_end_ids(folder, config, llm["vocab_size"]), conversation=known_template(folder)
            ),
            tokenizer_path=self.tokenizer(folder, embedding_rows(merged)),
            metadata={"config": config, "num_shards": len(files)},
            checks=partial(torch_files_checks, [file for file in files if file.suffix != ".safetensors"]),
            key_map=key_map,
            errors=fitting.errors,
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write ``model*.safetensors``, ``config.json`` and what transformers reads beside them."""
        numbers = self.numbers(source, options.recipe)
        convert = partial(
            rotary, rotary_to_halves, num_heads=numbers["num_heads"], num_kv_heads=numbers["num_kv_heads"]
        )
        pieces = part_experts(pieces_of(source, hf_key_map(), conversion=convert))
        weight_map, written = write_safetensors_shards(folder, source, pieces, options.max_shard_bytes, checksum=False)
        config = hf_from_numbers(numbers, str(source.dtype(EMBEDDING)).removeprefix("torch."))
        ends = list(options.recipe.get("end_ids") or ()) if options.recipe else []
        ids, texts = companion_files(options.tokenizer, options.files_of, ends)
        texts[CONFIG_NAME] = json_text(config | ids)
        if len(written) > 1:
            total = sum(piece.spec.num_bytes for piece in pieces)
            texts[INDEX_NAME] = json_text({"metadata": {"total_size": total}, "weight_map": weight_map})
        return texts
