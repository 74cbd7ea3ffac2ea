from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError


class Hub:
    """Stands in for ``snapshot_download``: files of a repository, fetched by the hub's own pattern rules."""

    def __init__(self, cache: Path, names: list[str]) -> None:
        self.cache, self.names, self.calls = cache, names, list[dict[str, Any]]()

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo, **options})
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.names, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
        for name in wanted:
            path = self.cache / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        self.cache.mkdir(exist_ok=True)
        return str(self.cache)


def fetched(hub: Hub) -> list[str]:
    return sorted(str(path.relative_to(hub.cache)) for path in hub.cache.rglob("*") if path.is_file())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.model",
        "README.md",
        "photo.png",
        "finetune/mm/SPHINX/consolidated.00-of-02.model.pth",
        "finetune/mm/SPHINX/meta.json",
        "finetune/mm/SPHINX/deeper/consolidated.00-of-02.model.pth",
        "old/pytorch_model.bin",
        "old/config.json",
    ]
    found = Hub(tmp_path / "cache", names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    return found


def test_paths_stay_paths(tmp_path: Path, hub: Hub) -> None:
    assert checkpoint.resolve(tmp_path) == tmp_path
    assert checkpoint.resolve(str(tmp_path / "none")) == tmp_path / "none"
    assert hub.calls == []
    with pytest.raises(
        CheckpointError, match=r"there is no such file or folder; for the hub's 'org/repo' write 'hf://org/repo'"
    ):
        checkpoint.resolve("org/repo")


def test_a_repository_without_its_other_folders(hub: Hub) -> None:
    assert checkpoint.resolve("hf://org/repo") == hub.cache
    assert fetched(hub) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (hub.calls[0]["repo"], hub.calls[0]["revision"]) == ("org/repo", None)


def test_a_folder_of_a_revision(hub: Hub) -> None:
    assert checkpoint.resolve("hf://org/repo@v1.0/finetune/mm/SPHINX/") == hub.cache / "finetune/mm/SPHINX"
    assert fetched(hub) == [
        "finetune/mm/SPHINX/consolidated.00-of-02.model.pth",
        "finetune/mm/SPHINX/meta.json",
    ]
    assert (hub.calls[0]["repo"], hub.calls[0]["revision"]) == ("org/repo", "v1.0")


def test_pickles_only_where_there_is_nothing_better(hub: Hub) -> None:
    assert checkpoint.resolve("hf://org/repo/old") == hub.cache / "old"
    assert fetched(hub) == ["old/config.json", "old/pytorch_model.bin"]


def test_a_folder_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="the repository has no file or folder 'nothing'"):
        checkpoint.resolve("hf://org/repo/nothing")


@pytest.mark.parametrize("text", ["hf://", "hf://repo", "hf://org/repo@", "hf://org/repo/../../etc", "hf://org/re po"])
def test_malformed_ids(text: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"is not a hub id; expected hf://org/repo\[@revision\]\[/file or f"):
        checkpoint.resolve(text)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network\nand more"), ConnectionError(""), OSError("dns")]
)
def test_offline_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(
        CheckpointError, match=r"hf://org/repo: cannot be fetched and is not in the local cache"
    ) as caught:
        checkpoint.resolve("hf://org/repo")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "and more" not in str(caught.value)


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = huggingface_hub.snapshot_download

    def cached_only(repo: str, **options: Any) -> str:
        return str(real(repo, cache_dir=tmp_path, local_files_only=True, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_only)
    with pytest.raises(CheckpointError, match=r"not in the local cache \(LocalEntryNotFoundError"):
        checkpoint.resolve("hf://sphinxkit-test/none")


def test_patterns_of_the_hub_match_across_folders() -> None:
    assert fnmatch.fnmatch("a/b.pth", "*.pth")  # the reason for the ignored patterns
