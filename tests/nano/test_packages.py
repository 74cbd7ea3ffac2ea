"""The trained weights get into what is installed: built from a copy of the sources, with a small checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import sphinxkit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", ".gitignore")
WEIGHTS = "sphinxkit/nano/weights"
MAX_BYTES = 16 * 2**20  # what the trained checkpoint may take


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / name)
    for name in ("sphinxkit", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    sphinxkit.build("sphinx_micro", dtype=torch.bfloat16).save(folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    return folder


def test_wheel_and_sdist_hold_the_checkpoint(tree: Path, built: Path) -> None:
    expected = {f"{WEIGHTS}/{path.name}": path.read_bytes() for path in (tree / WEIGHTS).iterdir()}
    assert len(expected) == 4
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name: archive.read(name) for name in archive.namelist() if WEIGHTS in name} == expected
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        for name, content in expected.items():
            file = archive.extractfile(members[name])
            assert file is not None
            assert file.read() == content


@pytest.mark.slow
def test_an_installed_wheel_answers_without_a_checkpoint(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")  # noqa: S202
    arguments = ("-p", "What?", "--max-new-tokens", "2", "--device", "cpu", "--dtype", "float32")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "sphinxkit", "generate", *arguments],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "model: SPHINX-nano, 0.4 M parameters\n"


def test_git_takes_the_weights() -> None:
    names = [f"{WEIGHTS}/{name}" for name in ("model.safetensors", "recipe.yaml", "tokenizer.model")]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""


def test_the_committed_checkpoint_is_small_enough() -> None:
    files = list((ROOT / WEIGHTS).glob("*"))
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
