"""From what a user writes to a local folder: a path, or a checkpoint on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from sphinxkit.errors import CheckpointError

_SCHEME = "hf://"
_HUB_ID = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./ -]*))?")
_WANTED = ("*.json", "*.safetensors", "*.pth", "*.yaml", "tokenizer.model")
_WEIGHTS = (".safetensors", ".pth", ".bin")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint, fetched from the hub if it is named ``hf://org/repo[@revision][/folder]``.

    With a revision, the folder starts after the first slash behind it. Files that are in the local cache are not
    fetched again, and without a network (or with ``HF_HUB_OFFLINE=1``) the cache alone is used.

    Args:
        path_or_hub_id: A path, or a hub id with the ``hf://`` in front.
    Raises:
        CheckpointError: No such folder; a malformed id; or the hub cannot be asked and the cache does not have it.
    """
    text = str(path_or_hub_id)
    if not (isinstance(path_or_hub_id, str) and text.startswith(_SCHEME)):
        path = Path(path_or_hub_id)
        if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            raise CheckpointError(f"{path}: there is no such folder; for the hub's {text!r} write 'hf://{text}'")
        return path
    repo, revision, folder = _parse(text)
    prefix = f"{folder}/" if folder else ""
    root = _download(text, repo, revision, [prefix + pattern for pattern in _WANTED], prefix)
    found = root / folder if folder else root
    if found.is_dir() and not any(item.name.endswith(_WEIGHTS) for item in found.iterdir()):
        root = _download(text, repo, revision, [f"{prefix}*.bin"], prefix)  # only where there is nothing better
        found = root / folder if folder else root
    if not found.is_dir():
        raise CheckpointError(f"{text}: the repository has no folder {folder!r} with a checkpoint in it")
    return found


def _parse(text: str) -> tuple[str, str | None, str | None]:
    match = _HUB_ID.fullmatch(text)
    folder = match.group(3).strip("/") if match and match.group(3) else None
    if match is None or (folder and ".." in folder.split("/")):
        raise CheckpointError(f"{text!r} is not a hub id; expected hf://org/repo[@revision][/folder]")
    return match.group(1), match.group(2), folder or None


def _download(text: str, repo: str, revision: str | None, patterns: list[str], prefix: str) -> Path:
    from huggingface_hub import snapshot_download

    deeper = [f"{prefix}*/*"]  # the hub's patterns match across folders
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=deeper))
    except Exception as error:  # connection, authentication, cache and validation errors come from several libraries
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise CheckpointError(
            f"{text}: cannot be fetched and is not in the local cache ({type(error).__name__}: {first}). Check the "
            "name, the network (or HF_HUB_OFFLINE) and `hf auth login`, or give the path of a downloaded folder"
        ) from error
