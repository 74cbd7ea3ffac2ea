from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

import sphinxkit
from sphinxkit.errors import CheckpointError

TOKEN = "t"  # noqa: S105 - no password


class FakeHub:
    """Keeps what is uploaded."""

    repos: dict[str, dict[str, bytes]]
    private: dict[str, bool | None]
    messages: list[str]
    tokens: list[str | None]

    def __init__(self, token: str | None = None) -> None:
        self.tokens.append(token)

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.repos.setdefault(repo, {})
        self.private[repo] = private

    def create_commit(self, repo: str, operations: list[Any], *, commit_message: str) -> SimpleNamespace:
        if repo == "org/refused":
            raise ConnectionError("401 Unauthorized")
        for each in operations:
            with each.as_file() as file:
                self.repos[repo][each.path_in_repo] = file.read()
        self.messages.append(commit_message)
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    kept = type("Hub", (FakeHub,), {"repos": {}, "private": {}, "messages": [], "tokens": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", kept)
    return kept


def head(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_model(hub: type[FakeHub], golden: Path, tmp_path: Path) -> None:
    model = sphinxkit.load(golden / "llama_ens_light")
    address = sphinxkit.push_to_hub(
        model, "org/tiny", private=True, license="llama2", base_model="org/base", token=TOKEN
    )
    assert address == "https://hub/org/tiny/commit/1"
    assert (hub.private["org/tiny"], hub.tokens, hub.messages) == (True, [TOKEN], ["Upload tiny with sphinxkit"])
    files = hub.repos["org/tiny"]
    back = sphinxkit.load(written(files, tmp_path / "got"))
    assert all((back.state_dict()[key] == value).all() for key, value in model.state_dict().items())
    card = files["README.md"].decode()
    assert head(card) == {
        "library_name": "sphinxkit",
        "pipeline_tag": "image-text-to-text",
        "tags": ["sphinx", "sphinxkit", "multimodal"],
        "license": "llama2",
        "base_model": ["org/base"],
    }
    assert "# tiny\n" in card
    assert f"{model.require_vision().num_tokens} tokens" in card
    assert f"{sum(each.numel() for each in model.parameters()):,}" in card
    assert 'sphinxkit.load("hf://org/tiny")' in card
    assert "AutoProcessor" not in card


def test_for_transformers(hub: type[FakeHub], golden: Path, tmp_path: Path) -> None:
    sphinxkit.push_to_hub(golden / "llama_ens_light", "org/tiny", format="hf", commit_message="First")
    files = hub.repos["org/tiny"]
    assert {"config.json", "model.safetensors", "processor_config.json", "chat_template.jinja"} <= files.keys()
    assert json.loads(files["config.json"])["model_type"] == "sphinx"
    card = files["README.md"].decode()
    assert head(card)["library_name"] == "transformers"
    assert 'AutoProcessor.from_pretrained("org/tiny")' in card
    assert hub.messages == ["First"]
    assert sphinxkit.load(written(files, tmp_path / "got")).vision is not None


def test_a_folder_as_it_is(hub: type[FakeHub], golden: Path, tmp_path: Path) -> None:
    folder = sphinxkit.convert(golden / "llama_ens_light", tmp_path / "own")
    (folder / "provenance.json").write_text('{"method": "linear", "sources": ["a", "b"]}')
    (folder / "notes.txt").write_text("mine")
    sphinxkit.push_to_hub(folder, "org/own")
    files = hub.repos["org/own"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"notes.txt"} | {"README.md"}
    assert all(files[name] == (folder / name).read_bytes() for name in files.keys() - {"README.md"})
    assert '"method": "linear"' in files["README.md"].decode()
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("# Mine\n")
    sphinxkit.push_to_hub(folder, "org/own")
    assert files["README.md"] == b"# Mine\n"


def test_what_cannot_be_uploaded(hub: type[FakeHub], golden: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'tiny' is no repository; expected org/name"):
        sphinxkit.push_to_hub(golden / "llama_ens_light", "tiny")
    with pytest.raises(CheckpointError, match="there is no such file or folder|there is no such folder"):
        sphinxkit.push_to_hub(tmp_path / "none", "org/tiny")
    with pytest.raises(CheckpointError, match=r"org/refused: cannot be uploaded \(ConnectionError: 401 Unauthorized\)"):
        sphinxkit.push_to_hub(golden / "llama_ens_light", "org/refused")
    own = sphinxkit.convert(golden / "llama_ens_light", tmp_path / "own")
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        sphinxkit.push_to_hub(own, "org/damaged")
    assert hub.repos.keys() == {"org/refused"}
