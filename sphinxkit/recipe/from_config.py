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


def expand_document(document: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A document of kind ``model`` with what lies in files written out.

    From ``llm: {type: from_config}`` come its numbers, ``tokenizer``, ``conversation`` and ``end_ids``, as far as the
    document does not say them itself; nothing is fetched, a folder of the hub has to be in the local cache. A
    ``conversation: {type: jinja, file: ...}`` gets the file's text.

    Args:
        document: Valid.
        folder: That paths may be relative to.
    Returns:
        The document itself where there is nothing to write out.
    Raises:
        RecipeError: There is no such folder or file, or it is not in the cache.
        CheckpointError: The folder's numbers are those of another kind of model.
    """
    llm, conversation = document["llm"], document.get("conversation")
    if isinstance(llm, Mapping) and llm["type"] == FROM_CONFIG:
        found = read_language_model(_local_folder(str(llm["path"]), folder))
        changed = {key: llm[key] for key in ("attention", "max_seq_len") if llm.get(key) is not None}
        document = {**document, "llm": {**found.llm, **changed}}
        if found.tokenizer is not None and document.get("tokenizer") is None:
            document["tokenizer"] = str(found.tokenizer.absolute())
        if found.conversation is not None and conversation is None:
            document["conversation"] = found.conversation
        if found.end_ids and not document.get("end_ids"):
            document["end_ids"] = list(found.end_ids)
    if isinstance(conversation, Mapping) and conversation["type"] == "jinja" and conversation.get("file") is not None:
        path = folder / conversation["file"]
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"conversation.file: {path} cannot be read: {error}") from error
        rest = {key: value for key, value in conversation.items() if key != "file"}
        document = {**document, "conversation": {**rest, "template": text}}
    return document


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
