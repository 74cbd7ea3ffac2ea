"""Downloading all that a recipe needs from the hub: ``sphinxkit.fetch``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sphinxkit import encoders, hub
from sphinxkit.checkpoint.resolve import wanted_files
from sphinxkit.encoders import Encoder
from sphinxkit.encoders.weight_files import find_hub_folder, needed_files
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.hub import HubFile, HubListing, HubPath, is_nano
from sphinxkit.recipe.from_config import FROM_CONFIG
from sphinxkit.recipe.recipe import Recipe
from sphinxkit.recipe.weights import PARTS, EncoderSource, beside, encoder_sources, sources_by_part
from sphinxkit.tensor_files.files import read_json

_INDEX = ".index.json"


@dataclass(frozen=True)
class NeededFiles:
    """What one place of a recipe needs from the hub.

    Args:
        place: In the recipe: ``vision.branches[0].encoders[0]``, ``init_from.llm``.
        source: As the recipe names it.
        license: Of the repository, as its card states it ("" where it does not, or without a network).
        is_gated: Whether the repository requires accepting its licence on its page.
        files: What is needed; ``local`` is None where it is not in the cache.
        problem: Why the files are not known, without a network; "" otherwise.
    """

    place: str
    source: HubPath
    license: str
    is_gated: bool
    files: tuple[HubFile, ...]
    problem: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of all files whose size is known."""
        return sum(file.size or 0 for file in self.files)

    @property
    def missing(self) -> tuple[HubFile, ...]:
        """Files that are not in the cache."""
        return tuple(file for file in self.files if file.local is None)


def fetch(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    to: str | Path | None = None,
    announce: Callable[[Sequence[NeededFiles]], None] | None = None,
) -> list[NeededFiles]:
    """Download what a recipe needs from the hub, and of each repository only the files that are needed.

    For a model that is its encoders' public weights (``weights:``) and the configuration that ``from_config`` reads,
    for a training stage what ``init_from`` names, for a mix its models. Files that are in the cache stay; an
    interrupted download is resumed. Without a network it checks that everything is there.

    Args:
        recipe: A shipped name, a path, a dict or a Recipe; or a whole checkpoint, ``hf://org/repo[@revision][/folder]``.
        to: Folder of a cache of its own, such as for a machine without a network; use it with ``HF_HUB_CACHE``. None:
            the usual cache.
        announce: Called with everything that is needed, before anything is downloaded.
    Returns:
        What was needed, in the recipe's order, with the local path of every file.
    Raises:
        RecipeError: The recipe is not valid.
        CheckpointError: A repository cannot be reached, the disk is too small, or without a network something is
            missing: one error lists it all.
    """
    cache = None if to is None else Path(to)
    sources: Needs
    if is_nano(recipe):
        sources = iter(())  # it comes with the package
    elif isinstance(recipe, str) and hub.is_hub_path(recipe):
        sources = iter([("checkpoint", recipe, None)])
    else:
        sources = _sources(Recipe.find_written(recipe))
    needed = [_find(place, source, encoder, cache) for place, source, encoder in sources]
    if announce is not None:
        announce(needed)
    raise_errors("the hub cannot be reached, and the cache lacks", _absent(needed))
    _check_disk(needed, cache)
    return [_download(item, cache) for item in needed]


Needs = Iterator[tuple[str, str, Encoder | None]]


def _sources(recipe: Recipe) -> Needs:
    """Place, hub source, and the encoder that it is for (on the meta device), or None for a whole checkpoint."""
    document = recipe.document
    folder = None if recipe.source is None else recipe.source.parent
    if recipe.kind == "model":
        yield from _of_encoders(encoder_sources(recipe))
        yield from _of_config(document)
    elif recipe.kind == "train":
        model = document["model"]
        found = Recipe.find_written(beside(folder, model) if isinstance(model, str) else model)
        init_from = document.get("init_from")
        if isinstance(init_from, Mapping):
            for part in PARTS:
                yield from _of_checkpoints(f"init_from.{part}", [init_from.get(part)])
            yield from _of_encoders(sources_by_part(init_from, found, folder))
        else:
            yield from _of_checkpoints("init_from", [init_from] if isinstance(init_from, str) else init_from or [])
        yield from _of_config(found.document)
    elif recipe.kind == "mix":
        for key in ("models", "base"):
            given = document.get(key)
            yield from _of_checkpoints(key, given if isinstance(given, list) else [given])


def _of_encoders(places: Sequence[EncoderSource]) -> Needs:
    for place in places:
        if place.source == encoders.PRETRAINED or hub.is_hub_path(place.source or ""):
            encoder = place.on_meta()
            is_own = place.source == encoders.PRETRAINED
            yield place.path, encoders.published_source(encoder) if is_own else str(place.source), encoder


def _of_checkpoints(place: str, sources: Sequence[Any]) -> Needs:
    for source in sources:
        if hub.is_hub_path(source):
            yield place, source, None


def _of_config(document: Mapping[str, Any]) -> Needs:
    """A language model whose numbers come from a Hugging Face folder."""
    llm = document.get("llm")
    if isinstance(llm, Mapping) and llm["type"] == FROM_CONFIG and hub.is_hub_path(llm["path"]):
        yield "llm", llm["path"], None


def _find(place: str, source: str, encoder: Encoder | None, cache: Path | None) -> NeededFiles:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    where = HubPath.parse(source)
    if HF_HUB_OFFLINE and hub.cached_folder(replace(where, path=""), cache) is None:
        return NeededFiles(place, where, "", False, (), f"{source}: nothing of it")
    try:
        if encoder is not None:
            return _find_encoder(place, where, encoder, cache)
        listing = hub.list_files(where, cache)
        if place == "llm":
            names = [name for name in wanted_files(listing.files, where.path) if _is_config(name)]
        else:
            names = _with_indexed(listing, wanted_files(listing.files, where.path))
        files = tuple(listing.files.get(name, HubFile(name, None, None)) for name in names)
        problem = "" if place == "llm" or any(_is_weights(name) for name in names) else f"{source}: no weights in it"
        return NeededFiles(place, where, listing.license, listing.is_gated, files, problem)
    except CheckpointError as error:
        return NeededFiles(place, where, "", False, (), str(error))


def _find_encoder(place: str, where: HubPath, encoder: Encoder, cache: Path | None) -> NeededFiles:
    folder, chosen = find_hub_folder(where, cache)
    texts, files = needed_files(folder, chosen, lambda names: encoders.wanted_names(encoder, names, folder.label))
    listing = folder.listing
    names = [folder.full_name(name) for name in (*texts, *files)]
    found = tuple(listing.files.get(name, HubFile(name, None, None)) for name in names)
    return NeededFiles(place, where, listing.license, listing.is_gated, found)


def _with_indexed(listing: HubListing, names: Sequence[str]) -> list[str]:
    """Without a network the index tells which files there should be."""
    found = list(names)
    for name in names:
        local = listing.files[name].local
        if name.endswith(_INDEX) and local is not None and not listing.is_complete:
            folder = PurePosixPath(name).parent
            shards = read_json(local).get("weight_map", {}).values()
            found += sorted({(folder / shard).as_posix() for shard in shards} - set(found))
    return found


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".pth", ".bin"))


def _is_config(name: str) -> bool:
    return not _is_weights(name) and not name.endswith(_INDEX)


def _absent(needed: Sequence[NeededFiles]) -> list[str]:
    """What cannot be downloaded, since the hub did not answer (or refused)."""
    return [
        *(f"{item.place}: {item.problem}" for item in needed if item.problem),
        *(
            f"{item.place}: {item.source.text}: {file.name}"
            for item in needed
            for file in item.missing
            if file.size is None
        ),
    ]


def _check_disk(needed: Sequence[NeededFiles], cache: Path | None) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) if cache is None else cache
    while not folder.exists():
        folder = folder.parent
    num_bytes = sum(
        {(item.source.repo, file.name): file.size or 0 for item in needed for file in item.missing}.values()
    )
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(f"{folder}: {num_bytes / 1e9:.1f} GB to download, the disk has {free / 1e9:.1f} GB free")


def _download(item: NeededFiles, cache: Path | None) -> NeededFiles:
    files = tuple(
        file if file.local is not None else replace(file, local=hub.fetch_file(item.source, file.name, cache))
        for file in item.files
    )
    return replace(item, files=files)
