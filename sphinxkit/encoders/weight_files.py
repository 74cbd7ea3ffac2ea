"""Finds and opens weight files, on disk or on the hub; only the needed ones."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sphinxkit import hub
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files import StoredTensor, read_json, read_tensor_files

# Names under which weights are published, the best first: safetensors before pickles, one file before an index of
# several that other tools wrote beside it. Source: huggingface_hub, constants.py; open_clip, constants.py.
_PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = ((".safetensors",), (".pth", ".pt", ".bin"))  # of files with other names, the better kind first
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")  # of trainers
_INDEX = ".index.json"
_CONFIGS = ("config.json", "open_clip_config.json")
_MAX_NAMED = 8  # file names in a message; our choice


Choice = Callable[[Collection[str]], Collection[str]]
"""Of the names of all tensors those that are wanted."""


class Folder(Protocol):
    """Files by name, on disk or on the hub."""

    @property
    def label(self) -> str:
        """What the user wrote."""
        ...

    def names(self) -> list[str]:
        """Names of the files directly in it."""
        ...

    def file(self, name: str) -> Path:
        """The local path of one of them."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on disk.

    Args:
        label: Source as the user wrote it.
        path: The folder.
    """

    label: str
    path: Path

    def names(self) -> list[str]:
        """Names of the files in it."""
        return sorted(item.name for item in self.path.iterdir() if item.is_file())

    def file(self, name: str) -> Path:
        """The path of one of them."""
        return self.path / name


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository on the hub; a file is fetched when it is asked for.

    Args:
        place: The folder.
        listing: Its contents.
        cache_dir: Cache folder instead of the usual one.
    """

    place: hub.HubPath
    listing: hub.HubListing
    cache_dir: Path | None = None

    @property
    def label(self) -> str:
        """What the user wrote."""
        return self.place.text

    def names(self) -> list[str]:
        """Names of the files directly in it."""
        below = (PurePosixPath(name).relative_to(self.place.path) for name in self.listing.files)
        return sorted(path.as_posix() for path in below if len(path.parts) == 1)

    def file(self, name: str) -> Path:
        """The local path of one of them, fetched if it is not in the cache."""
        return hub.fetch_file(self.place, self.full_name(name), self.cache_dir)

    def full_name(self, name: str) -> str:
        """The path in the repository of one of them."""
        return (PurePosixPath(self.place.path) / name).as_posix()


def find_hub_folder(place: hub.HubPath, cache_dir: Path | None = None) -> tuple[HubFolder, list[str]]:
    """The folder on the hub of a source of weights and the files in it that are meant.

    Args:
        place: A repository, or a file or folder in it.
        cache_dir: Cache folder instead of the usual one.
    Raises:
        CheckpointError: It holds no tensors, or cannot be asked.
    """
    listing = hub.list_files(place, cache_dir)
    if place.path in listing.files:
        above = PurePosixPath(place.path).parent.as_posix().removeprefix(".")
        parent = hub.HubPath(place.text, place.repo, place.revision, above)
        return HubFolder(parent, hub.list_files(parent, cache_dir), cache_dir), [PurePosixPath(place.path).name]
    folder = HubFolder(place, listing, cache_dir)
    return folder, choose_files(folder.names(), folder.label)


def find_folder(source: str | Path) -> tuple[Folder, list[str]]:
    """The folder of a source of weights and the files in it that are meant: an index, a file, or several.

    Args:
        source: A file, a folder, or ``hf://org/repo[@revision][/path]``.
    Raises:
        CheckpointError: There is no such file or folder, or it holds no tensors.
    """
    if hub.is_hub_path(source):
        return find_hub_folder(hub.HubPath.parse(str(source)))
    path = hub.existing(source)
    if path.is_file():
        return LocalFolder(str(source), path.parent), [path.name]
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    folder = LocalFolder(str(source), path)
    return folder, choose_files(folder.names(), folder.label)


def choose_files(names: Collection[str], label: str) -> list[str]:
    """The files of a folder that hold its weights: the best known name, or all files of the better kind.

    Args:
        names: Of the folder's files.
        label: The folder, for messages.
    Raises:
        CheckpointError: None of them holds tensors.
    """
    for name in _PREFERRED:
        if name in names:
            return [name]
    for suffixes in _SUFFIXES:
        indexes = [name for name in names if name.endswith(tuple(f"{suffix}{_INDEX}" for suffix in suffixes))]
        files = [name for name in names if name.endswith(suffixes) and name not in _NOT_WEIGHTS]
        if indexes or files:
            return indexes or files
    found = ", ".join(sorted(names)[:_MAX_NAMED]) or "nothing"
    raise CheckpointError(f"{label}: expected files of tensors (.safetensors, .bin, .pth, .pt), found {found}")


@dataclass(frozen=True)
class WeightFiles:
    """Opened files of tensors, none of them read yet.

    Args:
        label: Source as the user wrote it.
        tensors: By the files' names, without a ``module.`` that is before all of them.
        files: The files that were opened.
        configs: The JSON files beside them, by name.
        is_joined: Whether the files are several without an index.
    """

    label: str
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    configs: Mapping[str, Mapping[str, Any]]
    is_joined: bool = False


def needed_files(folder: Folder, chosen: list[str], choose: Choice) -> tuple[list[str], list[str]]:
    """The configurations and the files of tensors to open; of an index only those with a chosen tensor.

    Args:
        folder: As :func:`find_folder` gives it.
        chosen: Files of tensors, as :func:`find_folder` gives them.
        choose: Given the names of all tensors in an index, returns the chosen ones.
    Raises:
        CheckpointError: An index that is damaged or cannot be fetched.
    """
    configs = [name for name in _CONFIGS if name in folder.names()]
    if len(chosen) == 1 and chosen[0].endswith(_INDEX):
        weight_map = _weight_map(folder.file(chosen[0]))
        return [*configs, chosen[0]], sorted({weight_map[name] for name in choose(weight_map)})
    return configs, chosen


def open_files(source: str | Path, choose: Choice) -> WeightFiles:
    """Open the files that a source names; of an index only those with a chosen tensor.

    Args:
        source: A file, a folder, or ``hf://org/repo[@revision][/path]``.
        choose: As :func:`needed_files` takes it.
    Raises:
        CheckpointError: No such source, no tensors, a damaged file, a TorchScript archive, or a name that two files
            have.
    """
    folder, chosen = find_folder(source)
    texts, files = needed_files(folder, chosen, choose)
    configs = {name: read_json(folder.file(name)) for name in texts if name in _CONFIGS}
    tensors: dict[str, StoredTensor] = {}
    paths = []
    for name in files:
        path = folder.file(name)
        _refuse_torchscript(path)
        found, opened = read_tensor_files(path)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise CheckpointError(
                f"{folder.label}: {name} and another file both hold {twice[0]!r}; name one of {', '.join(files)}"
            )
        tensors |= found
        paths += opened
    if all(name.startswith("module.") for name in tensors):  # a DistributedDataParallel wrapper was saved
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return WeightFiles(folder.label, tensors, tuple(paths), configs, is_joined=len(chosen) > 1)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and PurePosixPath(file).name == file for file in weight_map.values()
    ):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to names of files beside it")
    return weight_map


def _refuse_torchscript(path: Path) -> None:
    """OpenAI's CLIP files are programs; torch reads them in another way, which runs them."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        is_program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    if is_program:
        raise CheckpointError(
            f"{path}: refused: a TorchScript archive, which is a program and not tensors (OpenAI publishes CLIP so). "
            f"Take the same weights as hf://openai/clip-vit-large-patch14 (or -base-patch32, ...), or save its tensors "
            f"once, where you trust it: torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), "
            "'clip.pth')"
        )
