"""``llm: {type: from_config, path: ...}``: numbers, tokenizer and end ids from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinxkit import hub
from sphinxkit.checkpoint.formats.hf import CONFIG_NAME, read_language_model
from sphinxkit.errors import RecipeError

FROM_CONFIG = "from_config"
"""A word of recipes; no builder has this name."""


def from_config(path: str, attention: str = "auto", max_seq_len: int | None = None) -> None:
    """What a recipe may write beside ``type: from_config``; only the signature counts.

    Args:
        path: A folder with ``config.json`` (beside the recipe or anywhere), or ``hf://org/repo``.
        attention: Name of an attention backend.
        max_seq_len: Longest sequence; None: as ``config.json`` says.
    """


def expand_document(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A document of kind ``model`` with ``llm: {type: from_config}`` written out, and ``tokenizer`` and ``end_ids``.

    What the document says itself stays. Nothing is fetched: a folder of the hub has to be in the local cache.

    Args:
        document: Valid, with ``type: from_config``.
        folder: That a path may be relative to.
    Raises:
        RecipeError: There is no such folder, or it is not in the cache.
        CheckpointError: Its numbers are those of another kind of model.
    """
    options = dict(document["llm"])
    found = read_language_model(_local_folder(str(options["path"]), folder))
    changed = {key: options[key] for key in ("attention", "max_seq_len") if options.get(key) is not None}
    expanded = {**document, "llm": {**found.llm, **changed}}
    if found.tokenizer is not None and document.get("tokenizer") is None:
        expanded["tokenizer"] = str(found.tokenizer.absolute())
    if found.end_ids and not document.get("end_ids"):
        expanded["end_ids"] = list(found.end_ids)
    return expanded


def _local_folder(path: str, folder: Path) -> Path:
    if hub.is_hub_path(path):
        place = hub.HubPath.parse(path)
        cached = hub.cached_folder(place)
        if cached is None or not (cached / CONFIG_NAME).is_file():
            raise RecipeError(
                f"llm.path: {path} has no {CONFIG_NAME} in the local cache; run `sphinxkit fetch` with this recipe"
            )
        return cached
    found = folder / path if (folder / path).exists() else Path(path)
    if not (found / CONFIG_NAME).is_file():
        raise RecipeError(f"llm.path: {found} is no folder with a {CONFIG_NAME}")
    return found
