"""A whole SPHINX as a Hugging Face folder: the files of ``sphinxkit.integrations.transformers``'s classes.

``config.json`` has ``model_type: sphinx``, the language model's own configuration as ``text_config`` and the recipe,
which rebuilds the vision tower. The image's token has the id behind the tokenizer's last; no row of the embedding
belongs to it. transformers is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.formats.hf import (
    CONFIG_NAME,
    INDEX_NAME,
    check_tie,
    find_weights,
    hf_key_map,
    join_experts,
    part_experts,
    rotary,
    rotary_to_halves,
    rotary_to_pairs,
)
from sphinxkit.checkpoint.formats.hf_companions import companion_files
from sphinxkit.checkpoint.formats.hf_config import SPHINX, hf_from_numbers
from sphinxkit.checkpoint.formats.tokenizer_json import CONFIG_NAME as TOKENIZER_CONFIG_NAME
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.llm_config import EMBEDDING, HEAD, embedding_rows, refuse_unsupported
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import MergedTensor
from sphinxkit.checkpoint.writing import (
    TensorInput,
    Texts,
    WriteOptions,
    json_text,
    pieces_of,
    write_safetensors_shards,
)
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.files import read_json, read_tensor_files
from sphinxkit.tensor_files.tokenizer_files import IMAGE_TOKEN, tokenizer_size

ARCHITECTURE = "SphinxForConditionalGeneration"
_LLM, _HEAD = "model.language_model.", "lm_head.weight"
_TOWER = NameRule("model.vision_tower.*", "vision.*")


def hf_sphinx_key_map() -> KeyMap:
    """Names of ``SphinxForConditionalGeneration``: the language model's own, the vision tower's ours."""
    rules = [
        rule if rule.theirs == _HEAD else replace(rule, theirs=_LLM + rule.theirs.removeprefix("model."))
        for rule in hf_key_map().rules
    ]
    return KeyMap([*rules, _TOWER])


@register("hf_sphinx")
class HuggingFaceSphinx(Format):
    """A whole SPHINX in Hugging Face's layout."""

    name = "hf_sphinx"
    looks_like = "model.safetensors with config.json of model_type sphinx"
    has_options = True
    may_pad_vocabulary = True

    def detect(self, folder: Path) -> bool:
        """Whether the folder has weights and a ``config.json`` of this model type."""
        config = folder / CONFIG_NAME
        return config.is_file() and find_weights(folder) is not None and read_json(config).get("model_type") == SPHINX

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder with weight files and ``config.json``.

        Raises:
            CheckpointError: Damaged or missing files, no recipe, or names that the classes do not have.
        """
        weights, path = find_weights(folder), folder / CONFIG_NAME
        if weights is None or not path.is_file():
            raise CheckpointError(f"{folder}: needs model.safetensors (or its index) and {CONFIG_NAME}")
        config = read_json(path)
        llm, recipe = config.get("text_config"), config.get("recipe")
        if not isinstance(llm, Mapping) or not isinstance(recipe, Mapping):
            raise CheckpointError(f"{path}: expected objects 'text_config' and 'recipe'; sphinxkit convert writes them")
        heads = llm.get("num_attention_heads")
        kv_heads = llm.get("num_key_value_heads") or heads
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads < 1 or kv_heads < 1:
            raise CheckpointError(
                f"{path}: text_config: expected numbers of heads, got {heads!r:.40}, {kv_heads!r:.40}"
            )
        key_map = hf_sphinx_key_map()
        is_tied = bool(config.get("tie_word_embeddings") or llm.get("tie_word_embeddings"))
        stored, files = read_tensor_files(weights, lambda name: is_tied and name == _HEAD)
        stored = join_experts(stored)
        refuse_unsupported(
            [name for name in stored if not name.startswith("model.vision_tower.")], str(folder), key_map
        )
        errors: list[str] = []
        merged: dict[str, MergedTensor] = {}
        for name, tensor in stored.items():
            found = key_map.to_ours(name)
            if found is None:
                errors.append(f"{name!r} is not a name this format has")
            else:
                merged[found[0]] = MergedTensor([tensor], reorder=rotary(rotary_to_pairs, found[1], heads, kv_heads))
        if not options.defer_errors:
            raise_errors(f"{folder}: files and format do not fit together", errors)
        if is_tied and EMBEDDING in merged:
            check_tie(merged, path)
            merged.pop(HEAD, None)
        return Checkpoint(
            folder,
            self.name,
            merged,
            files,
            recipe=recipe,
            tokenizer_path=self.tokenizer(folder, embedding_rows(merged)),
            metadata={"config": config, "num_shards": len(files)},
            key_map=key_map,
            errors=errors,
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write ``model*.safetensors``, ``config.json`` and the tokenizer's files.

        What needs the model itself (chat template, processors' and generation's configurations) is written by
        :func:`sphinxkit.convert`.
        """
        recipe = options.recipe or {}
        numbers = self.numbers(source, options.recipe)
        convert = partial(
            rotary, rotary_to_halves, num_heads=numbers["num_heads"], num_kv_heads=numbers["num_kv_heads"]
        )
        pieces = part_experts(pieces_of(source, hf_sphinx_key_map(), conversion=convert))
        weight_map, written = write_safetensors_shards(folder, source, pieces, options.max_shard_bytes, checksum=False)
        dtype = str(source.dtype(EMBEDDING)).removeprefix("torch.")
        ids, texts = companion_files(options.tokenizer, options.files_of, recipe.get("end_ids") or [])
        image_id = tokenizer_size(options.tokenizer) if options.tokenizer else numbers["vocab_size"]
        config = {
            "architectures": [ARCHITECTURE],
            "model_type": SPHINX,
            "text_config": hf_from_numbers(numbers, dtype) | ids,
            "recipe": dict(recipe),
            "image_token_id": image_id,
            "tie_word_embeddings": numbers["tie_embeddings"],
            "torch_dtype": dtype,
            **ids,
        }
        texts[CONFIG_NAME] = json_text(config)
        tokenizer = texts.get(TOKENIZER_CONFIG_NAME) or options.tokenizer.get(TOKENIZER_CONFIG_NAME, b"{}")
        texts[TOKENIZER_CONFIG_NAME] = json_text(_with_image_token(json.loads(tokenizer), image_id))
        if len(written) > 1:
            total = sum(piece.spec.num_bytes for piece in pieces)
            texts[INDEX_NAME] = json_text({"metadata": {"total_size": total}, "weight_map": weight_map})
        return texts


def _with_image_token(config: Mapping[str, Any], image_id: int) -> dict[str, Any]:
    """A ``tokenizer_config.json`` that adds the image's token, and pads at the left as generation needs."""
    plain = {  # beside added tokens, transformers wants special ones by their text
        key: value["content"] if key.endswith("_token") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    token = {"content": IMAGE_TOKEN, **flags, "special": True}
    pad = {} if plain.get("pad_token") else {"pad_token": plain.get("unk_token") or plain.get("eos_token")}
    added = {**(config.get("added_tokens_decoder") or {}), str(image_id): token}
    return {**plain, **pad, "padding_side": "left", "added_tokens_decoder": added, "image_token": IMAGE_TOKEN}
