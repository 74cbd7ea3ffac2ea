from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sphinxkit import hub
from sphinxkit.errors import CheckpointError
from sphinxkit.hub import HubFile, HubPath

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one repository with two files of it, and no network."""
    repo = tmp_path / "models--org--repo"
    for name, text in {"config.json": "{}", "deep/model.safetensors": "tensors"}.items():
        path = repo / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for function in ("snapshot_download", "hf_hub_download"):
        real = getattr(huggingface_hub, function)

        def cached_only(*arguments: Any, _real: Any = real, **options: Any) -> str:
            return str(_real(*arguments, **{**options, "cache_dir": tmp_path, "local_files_only": True}))

        monkeypatch.setattr(huggingface_hub, function, cached_only)

    class Offline:
        def model_info(self, *arguments: Any, **options: Any) -> Any:
            raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("hf://org/repo", "org/repo", None, ""),
        ("hf://org/repo@v1.0", "org/repo", "v1.0", ""),
        ("hf://org/repo@main/deep/model.safetensors", "org/repo", "main", "deep/model.safetensors"),
        ("hf://o-r.g/re_po/folder/", "o-r.g/re_po", None, "folder"),
    ],
)
def test_hub_paths(text: str, repo: str, revision: str | None, path: str) -> None:
    assert HubPath.parse(text) == HubPath(text, repo, revision, path)
    assert hub.is_hub_path(text)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://repo", "hf://org/repo@", "hf://org/repo/../etc", "org/repo", "hf://a/b c"]
)
def test_malformed_hub_paths(text: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"is not a hub id; expected hf://org/repo\[@revision\]\[/file or folder\]"
    ):
        HubPath.parse(text)


def test_paths_are_not_hub_paths(tmp_path: Path) -> None:
    assert not hub.is_hub_path("models/clip.pth")
    assert not hub.is_hub_path(Path("hf://org/repo"))
    assert hub.existing(tmp_path) == tmp_path
    assert hub.existing("none/of/these") == Path("none/of/these")
    with pytest.raises(CheckpointError, match="for the hub's 'org/repo' write 'hf://org/repo'"):
        hub.existing("org/repo")


def test_a_listing_without_a_network_is_what_the_cache_holds(cache: Path) -> None:
    listing = hub.list_files(HubPath.parse("hf://org/repo"))
    assert not listing.is_complete
    assert listing.license == ""
    assert listing.files == {
        "config.json": HubFile("config.json", 2, cache / "config.json"),
        "deep/model.safetensors": HubFile("deep/model.safetensors", 7, cache / "deep/model.safetensors"),
    }
    assert list(hub.list_files(HubPath.parse("hf://org/repo/deep")).files) == ["deep/model.safetensors"]
    assert list(hub.list_files(HubPath.parse("hf://org/repo@main/config.json")).files) == ["config.json"]


def test_a_listing_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    class Api:
        def model_info(self, repo: str, revision: str | None, files_metadata: bool) -> Any:
            asked.append((repo, revision))
            assert files_metadata
            siblings = [
                SimpleNamespace(rfilename="config.json", size=2),
                SimpleNamespace(rfilename="model.safetensors", size=1000),
            ]
            return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="mit"))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    listing = hub.list_files(HubPath.parse("hf://org/repo@main"))
    assert asked == [("org/repo", "main")]
    assert (listing.is_complete, listing.license) == (True, "mit")
    assert listing.files == {
        "config.json": HubFile("config.json", 2, cache / "config.json"),
        "model.safetensors": HubFile("model.safetensors", 1000, None),
    }


def test_nothing_to_list(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="hf://org/other: cannot be fetched") as caught:
        hub.list_files(HubPath.parse("hf://org/other"))
    assert "no route to the hub" in str(caught.value)
    assert "and more" not in str(caught.value)


def test_one_file(cache: Path) -> None:
    place = HubPath.parse("hf://org/repo")
    assert hub.fetch_file(place, "deep/model.safetensors") == cache / "deep/model.safetensors"
    with pytest.raises(CheckpointError, match=r"hf://org/repo \(file model.bin\): cannot be fetched and is not in the"):
        hub.fetch_file(place, "model.bin")


def test_resolving_a_file_or_a_folder(cache: Path, tmp_path: Path) -> None:
    def resolve(source: str | Path) -> Path:
        return hub.resolve(source, ["*.json"], ["*.safetensors"], ["*.bin"])

    assert resolve(tmp_path) == tmp_path
    assert resolve("hf://org/repo") == cache
    assert resolve("hf://org/repo/deep") == cache / "deep"
    assert resolve("hf://org/repo/deep/model.safetensors") == cache / "deep/model.safetensors"
    with pytest.raises(CheckpointError, match="hf://org/repo/none: the repository has no file or folder 'none'"):
        resolve("hf://org/repo/none")
    with pytest.raises(CheckpointError, match=LocalEntryNotFoundError.__name__):
        resolve("hf://org/other")
