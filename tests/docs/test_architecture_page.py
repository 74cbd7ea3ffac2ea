"""The architecture page: its folders exist, its walks name functions that exist and are called in that order."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from PIL import Image

import sphinxkit
from sphinxkit.data.converters import convert_data
from sphinxkit.training import train

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(sphinxkit.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MAX_HOPS = 15
IMAGE, COCO, MIX = (
    "An image and a question to an answer",
    "A COCO annotation to a loss",
    "Two checkpoints to a mixed one",
)
HOP = re.compile(r"^(\d+)\. `([\w.]+)`: ([A-Z].*\.)$", re.MULTILINE)


def section(title: str) -> str:
    [found] = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


def walk(title: str) -> list[str]:
    hops = HOP.findall(section(title))
    numbered = re.findall(r"^\d+\. ", section(title), re.MULTILINE)
    assert [int(number) for number, _, _ in hops] == list(range(1, len(numbered) + 1))
    return [name for _, name, _ in hops]


def find(name: str) -> Any:
    """What ``name`` below sphinxkit names."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(f"sphinxkit.{'.'.join(parts[:count])}")
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = inspect.getattr_static(value, part)
        return value
    raise LookupError(name)


def code_of(name: str) -> CodeType:
    return inspect.unwrap(find(name)).__code__


@contextmanager
def called(codes: set[CodeType]) -> Iterator[list[CodeType]]:
    """Every call of a function of ``codes``, in order, in any thread."""
    found: list[CodeType] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in codes:
            found.append(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def check_order(title: str, journey: Callable[[], object]) -> None:
    """The walk is a part of the calls, in their order: what runs twice may run earlier, too."""
    names = {code_of(name): name for name in walk(title)}
    with called(set(names)) as found:
        journey()
    calls = iter(found)
    missing = [name for code, name in names.items() if code not in calls]
    assert not missing


def test_folders_and_layers_are_those_of_the_package() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    there -= {"__init__", "__main__"}
    [tree] = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    in_tree = {
        Path(word).stem for line in tree.splitlines() for word in line.split() if re.fullmatch(r"\w+(\.py|/)", word)
    }
    in_table = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| \d \|.*$", section("Layers"), re.MULTILINE))))
    assert in_tree == there | {"sphinxkit", "tasks"}
    assert in_table == there


@pytest.mark.parametrize("title", [IMAGE, COCO, MIX])
def test_every_hop_exists(title: str) -> None:
    names = walk(title)
    assert 5 <= len(names) <= MAX_HOPS
    assert len(set(names)) == len(names)
    for name in names:
        assert callable(find(name)), name
    for name in re.findall(r"`(\w+\.[\w.]+)`", section(title)):
        assert callable(find(name)), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("architecture") / "micro"
    sphinxkit.build("sphinx_micro").save(path)
    return path


def test_an_image_and_a_question_to_an_answer(checkpoint: Path) -> None:
    question = [{"role": "user", "content": "How many circles are there?"}]
    image = ROOT / "docs" / "images" / "nano_scene.png"
    check_order(IMAGE, lambda: sphinxkit.load(checkpoint).chat(question, image, max_new_tokens=2))


def test_two_checkpoints_to_a_mixed_one(checkpoint: Path, tmp_path: Path) -> None:
    check_order(MIX, lambda: sphinxkit.mix([checkpoint, checkpoint], tmp_path / "mixed", beta=0.5))


@pytest.mark.usefixtures("checkpoint")  # its libraries are imported then, which counts for no test
def test_a_coco_annotation_to_a_loss(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    annotations = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 30, 20], "iscrowd": 0}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(annotations))
    lines = tmp_path / "detection.jsonl"
    stream = {"mixture": {"sources": [{"path": str(lines), "type": "image-text"}]}, "batch_size": 1}
    recipe = {
        **{"kind": "train", "model": "sphinx_micro", "allow_random_encoders": True, "data": {"captions": stream}},
        **{"steps": 1, "lr": 1e-3, "device": "cpu", "dtype": "float32", "pack_tokens": 512, "num_workers": 0},
        **{"output": str(tmp_path / "run"), "export": False, "save_every": None},
    }

    def learn() -> None:
        convert_data(tmp_path / "coco.json", "coco", "detection", lines)
        train(recipe)

    check_order(COCO, learn)
