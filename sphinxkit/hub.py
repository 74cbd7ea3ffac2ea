"""Names of files elsewhere: ``hf://org/repo[@revision][/path]`` on the Hugging Face hub, ``nano`` in the package.

Files that are in the hub's local cache are not fetched again. Without a network (or with ``HF_HUB_OFFLINE=1``) the
cache alone is used. Interrupted downloads are resumed by ``huggingface_hub``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sphinxkit.errors import CheckpointError

SCHEME = "hf://"
NANO = "nano"
"""As text, it names SPHINX-nano wherever a checkpoint is expected; a directory of that name is ``./nano``."""
TITLE = "SPHINX-nano"
_NANO_FOLDER = Path(__file__).resolve().parent / "nano" / "weights"
_NANO_INDEX = "model.safetensors.index.json"
_NANO_FILES = ("recipe.yaml", "tokenizer.model", _NANO_INDEX)  # and the tensors that the index names
_HUB_PATH = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./ -]*))?")


@dataclass(frozen=True)
class HubPath:
    """A repository on the hub, or a file or folder in it.

    Args:
        text: What the user wrote, for messages.
        repo: ``org/name``.
        revision: Branch, tag or commit; None for the repository's default branch.
        path: File or folder in the repository; "" for all of it.
    """

    text: str
    repo: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Read ``hf://org/repo[@revision][/path]``.

        Raises:
            CheckpointError: It is not of that form.
        """
        match = _HUB_PATH.fullmatch(text)
        path = (match.group(3) or "").strip("/") if match else ""
        if match is None or ".." in path.split("/"):
            raise CheckpointError(f"{text!r} is not a hub id; expected hf://org/repo[@revision][/file or folder]")
        return cls(text, match.group(1), match.group(2), path)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Args:
        name: Its path in the repository.
        size: In bytes; None where the hub does not say.
        local: Its path in the local cache; None if it is not cached.
    """

    name: str
    size: int | None
    local: Path | None


@dataclass(frozen=True)
class HubListing:
    """Contents of a repository.

    Args:
        files: By name.
        license: As the repository's card states it ("" if it does not, or if the hub could not be asked).
        is_complete: Whether the hub itself was asked; False: only what the local cache holds.
        is_gated: Whether the repository requires accepting its licence before downloads.
    """

    files: dict[str, HubFile]
    license: str
    is_complete: bool
    is_gated: bool = False


def is_hub_path(source: str | Path) -> bool:
    """Whether ``source`` names something on the hub."""
    return isinstance(source, str) and source.startswith(SCHEME)


def fetch(place: HubPath, wanted: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Download the files that match ``wanted`` to the local cache.

    Args:
        place: The repository; its ``path`` is ignored.
        wanted: Patterns of file names in the repository (``*`` matches across folders).
        ignored: Patterns of files to skip.
    Returns:
        The local folder of the repository.
    Raises:
        CheckpointError: They cannot be fetched and are not in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            place.repo, revision=place.revision, allow_patterns=list(wanted), ignore_patterns=list(ignored)
        )
    except Exception as error:  # connection, authentication, cache and validation errors come from several libraries
        raise _cannot_fetch(place, error) from error
    return Path(folder)


def fetch_file(place: HubPath, name: str, cache_dir: Path | None = None) -> Path:
    """Download one file to the local cache.

    Args:
        place: The repository; its ``path`` is ignored.
        name: The file's path in the repository.
        cache_dir: Cache folder instead of the usual one.
    Raises:
        CheckpointError: It cannot be fetched and is not in the cache.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place.repo, name, revision=place.revision, cache_dir=cache_dir))
    except Exception as error:  # as in fetch
        raise _cannot_fetch(place, error, f" (file {name})") from error


def list_files(place: HubPath, cache_dir: Path | None = None) -> HubListing:
    """The files of a repository: as the hub says, or without a network as the local cache has them.

    Args:
        place: The repository; with a ``path`` only the files below it, or that file.
        cache_dir: Cache folder instead of the usual one.
    Raises:
        CheckpointError: The hub cannot be asked and the cache has nothing of the repository.
    """
    from huggingface_hub import HfApi

    cached = {name: HubFile(name, path.stat().st_size, path) for name, path in _cached_files(place, cache_dir).items()}
    license, is_gated = "", False
    try:
        info = HfApi().model_info(place.repo, revision=place.revision, files_metadata=True)
    except Exception as error:  # as in fetch
        if not cached:
            raise _cannot_fetch(place, error) from error
        files, is_complete = cached, False
    else:
        license, is_gated = str(getattr(info.card_data, "license", None) or ""), bool(getattr(info, "gated", False))
        files = {
            item.rfilename: HubFile(item.rfilename, item.size, getattr(cached.get(item.rfilename), "local", None))
            for item in info.siblings or []
        }
        is_complete = True
    prefix = f"{place.path}/" if place.path else ""
    below = {name: file for name, file in files.items() if name.startswith(prefix) or name == place.path}
    return HubListing(below, license, is_complete, is_gated)


def cached_folder(place: HubPath, cache_dir: Path | None = None) -> Path | None:
    """The folder of the local cache that holds a repository, or its ``path``; None where there is none.

    Args:
        place: The repository; nothing is fetched.
        cache_dir: Cache folder; None: the hub library's default.
    """
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(place.repo, revision=place.revision, local_files_only=True, cache_dir=cache_dir)
    except Exception:  # nothing of this revision is in the cache
        return None
    found = Path(root) / place.path
    return found if found.exists() else None


def _cached_files(place: HubPath, cache_dir: Path | None) -> dict[str, Path]:
    root = cached_folder(replace(place, path=""), cache_dir)
    if root is None:
        return {}
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def resolve(source: str | Path, texts: Sequence[str], weights: Sequence[str], fallback: Sequence[str]) -> Path:
    """The local file or folder that a path or ``hf://org/repo[@revision][/path]`` names, fetched if need be.

    For a folder on the hub, only its own files are fetched, not those of subfolders.

    Args:
        source: A path, or a hub id with ``hf://`` in front.
        texts: Patterns of the small files to fetch from a folder.
        weights: Patterns of the files of tensors to fetch from it.
        fallback: Patterns of tensor files to fetch if none match ``weights``.
    Raises:
        CheckpointError: There is no such path; a malformed id; the hub cannot be asked and the cache does not have it.
    """
    if not is_hub_path(source):
        return existing(source)
    place = HubPath.parse(str(source))
    prefix = f"{place.path}/" if place.path else ""
    deeper = [f"{prefix}*/*"]  # the hub's patterns match across folders
    patterns = [prefix + pattern for pattern in (*texts, *weights)]
    found = fetch(place, [place.path, *patterns] if prefix else patterns, deeper) / place.path
    if found.is_dir() and not any(item.match(pattern) for item in found.iterdir() for pattern in weights):
        found = fetch(place, [prefix + pattern for pattern in fallback], deeper) / place.path
    if not found.exists():
        raise CheckpointError(f"{source}: the repository has no file or folder {place.path!r}")
    return found


def existing(path: str | Path) -> Path:
    """``path`` itself, which may not exist, unless it is a hub id without its ``hf://``.

    Raises:
        CheckpointError: There is no such path, and it reads like a repository's name.
    """
    found = Path(path)
    if not found.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(
            f"{found}: there is no such file or folder; for the hub's {str(path)!r} write '{SCHEME}{path}'"
        )
    return found


def _cannot_fetch(place: HubPath, error: Exception, what: str = "") -> CheckpointError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    return CheckpointError(
        f"{place.text}{what}: cannot be fetched and is not in the local cache ({type(error).__name__}: {first}). Check "
        "the name, the network (or HF_HUB_OFFLINE), the repository's licence page and `hf auth login`, or give the "
        "path of what you downloaded"
    )


def is_nano(name: object) -> bool:
    """Whether a checkpoint's name means SPHINX-nano; a path object never does."""
    return isinstance(name, str) and name == NANO


def as_text(folder: Path) -> str:
    """A directory's path as text; of a directory called ``nano`` it is ``./nano``."""
    return f"./{folder}" if str(folder) == NANO else str(folder)


def nano_folder() -> Path:
    """Folder of the checkpoint that comes with the package, in sphinxkit's own layout.

    Raises:
        CheckpointError: This installation was made without it; names what is missing.
    """
    missing = [name for name in _NANO_FILES if not (_NANO_FOLDER / name).is_file()]
    if not any(_NANO_FOLDER.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise CheckpointError(
            f"{_NANO_FOLDER}: this installation comes without {TITLE}'s weights (missing: {', '.join(missing)}); "
            "name another checkpoint, or train it (sphinxkit reproduce nano)"
        )
    return _NANO_FOLDER


def name_in_record(checkpoint: str | Path) -> str:
    """Name of a checkpoint in a run's record; for SPHINX-nano it includes the weights' release.

    Args:
        checkpoint: A path, a hub id or ``nano``.
    """
    if not is_nano(checkpoint):
        return str(checkpoint)
    from sphinxkit.tensor_files.checksums import file_sha256

    return f"{TITLE} {file_sha256(nano_folder() / _NANO_INDEX)[:16]}"  # the index holds the checksum of every file
