"""The small files beside the weights that transformers reads: ids of special tokens, generation, the tokenizer's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.formats.tokenizer_json import CONFIG_NAME, from_sentencepiece, special_ids
from sphinxkit.checkpoint.writing import json_text
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.files import read_json
from sphinxkit.tensor_files.tokenizer_files import JSON_NAME, SENTENCEPIECE_NAME, SIDE_NAMES, parse_json

GENERATION_CONFIG_NAME = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BESIDE = (JSON_NAME, *SIDE_NAMES, "added_tokens.json")
_logger = logging.getLogger(__name__)


def companion_files(
    tokenizer: Mapping[str, bytes], folder: Path | None, end_ids: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What ``config.json`` says of special tokens, and the texts of the files beside it.

    What the first model's folder says is kept; what it does not say is taken from the tokenizer.

    Args:
        tokenizer: Name -> content of the files that are written anyway; may be empty.
        folder: Of the model, in Hugging Face's layout, whose files come along; None for none.
        end_ids: Ids that end an answer, from the recipe.
    Raises:
        CheckpointError: A file is damaged.
    """
    ids: dict[str, Any] = special_ids(tokenizer)
    texts: dict[str, str] = {}
    if folder is not None:
        config = read_json(folder / "config.json")
        ids |= {key: config[key] for key in _IDS if config.get(key) is not None}
        texts = _texts(folder, [GENERATION_CONFIG_NAME])
    if end_ids:
        ids["eos_token_id"] = list(end_ids)
    if ids and GENERATION_CONFIG_NAME not in texts:
        texts[GENERATION_CONFIG_NAME] = json_text(ids)
    content = tokenizer.get(SENTENCEPIECE_NAME)
    if content is None:
        return ids, texts
    model = None if folder is None else folder / SENTENCEPIECE_NAME
    beside = _texts(folder, _BESIDE) if folder and model and model.is_file() and model.read_bytes() == content else {}
    if JSON_NAME not in beside:
        try:
            made = from_sentencepiece(content)
        except CheckpointError as error:
            _logger.warning("%s; transformers needs the sentencepiece package to read the tokenizer", error)
        else:
            if CONFIG_NAME in beside:  # a chat template and the like
                theirs = parse_json(beside[CONFIG_NAME].encode(), CONFIG_NAME)
                made[CONFIG_NAME] = json_text(theirs | parse_json(made[CONFIG_NAME].encode(), CONFIG_NAME))
            beside |= made
    return ids, texts | beside


def _texts(folder: Path, names: Sequence[str]) -> dict[str, str]:
    try:
        return {name: (folder / name).read_text("utf-8") for name in names if (folder / name).is_file()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: a file beside the weights cannot be read: {error}") from error
