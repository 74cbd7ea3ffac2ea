"""A run on small files in the formats of published data sets: each sample once an epoch, killed and resumed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sphinxkit
from sphinxkit.data.sources.base import ShardChangedError
from sphinxkit.errors import DataError
from sphinxkit.training import TrainingError, TrainPlan, read_log, train
from sphinxkit.training.streams import Streams

pytest.importorskip("pyarrow")
pytestmark = [pytest.mark.integration, pytest.mark.slow]

EXACT = ("step", "loss", "losses", "grad_norm", "data", "samples", "tokens")
PARALLEL_ATOL = 1e-4  # as in test_parallel: float32 sums in another order
BATCH, EPOCHS = 8, 2
NUM_TEXTS = 12
COUNTS = {"laion": 10, "laion_coco": 6, "mix665k": 10, "coco_detection": 6}  # records by source


def picture(number: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number % 7, 30), (number * 20 % 256, 90, 255 - number * 9 % 256)).save(buffer, form)
    return buffer.getvalue()


def write_laion(folder: Path) -> None:
    """Shards as img2dataset writes LAION-400M."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(5):
                key, caption = f"{shard:05d}{number:04d}", f"a photo of thing {shard} {number}"
                described = {
                    "caption": caption,
                    "url": f"https://example.org/{key}.jpg",
                    "key": key,
                    "status": "success",
                }
                for ending, content in (
                    ("jpg", picture(shard * 5 + number)),
                    ("json", json.dumps(described | {"width": 20, "height": 30, "exif": "{}"}).encode()),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def write_tables(folder: Path) -> None:
    """LAION-COCO's columns with Hugging Face's images, and RefinedWeb's columns."""
    import pyarrow
    import pyarrow.parquet

    captions = [
        {
            "image": {"bytes": picture(number, "PNG"), "path": f"{number}.png"},
            "TEXT": "buy now",
            "top_caption": f"thing {number} on a table",
            "all_captions": ["x", "y"],
            "similarity": 0.3,
        }
        for number in range(6)
    ]
    texts = [
        {
            "content": " ".join(f"word {number} of {extra}" for extra in range(400 if number == 4 else 3 + number)),
            "url": "https://example.org",
            "dump": "CC-MAIN-2021-31",
            "segment": "1627",
            "image_urls": [["https://example.org/a.png", "alt"]],
        }
        for number in range(NUM_TEXTS)
    ]
    for name, rows in (("laion_coco", captions), ("refinedweb", texts)):
        (folder / name).mkdir()
        for shard, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            path = folder / name / f"{shard}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=2)


def write_llava(path: Path) -> None:
    """LLaVA-665K: texts beside images, ShareGPT's answers without question at the start."""
    (path.parent / "coco").mkdir()
    rows = []
    for number in range(10):
        turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]
        if number % 2:
            rows.append({"id": f"s{number}", "model": "", "conversations": [{"from": "gpt", "value": "..."}, *turns]})
            continue
        (path.parent / "coco" / f"{number}.jpg").write_bytes(picture(number))
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append({"id": f"{number}", "image": f"coco/{number}.jpg", "conversations": turns})
    path.write_text(json.dumps(rows, indent=1))


def write_coco(folder: Path) -> None:
    names = [f"{number:012d}.jpg" for number in range(6)]
    for number, name in enumerate(names):
        (folder / "coco" / name).write_bytes(picture(number))
    annotations = {
        "images": [{"id": n, "file_name": name, "width": 20 + n, "height": 30} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81, "iscrowd": 0} for n in range(6)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(annotations))
    sphinxkit.convert_data(folder / "instances.json", "coco", "detection", folder / "coco_detection.jsonl")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files; not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    write_laion(folder / "laion")
    write_tables(folder)
    write_llava(folder / "mix665k.json")
    write_coco(folder)
    return folder


@pytest.fixture
def recipe(document: Any, published: Path, tmp_path: Path) -> Any:
    """Makes a plan's document over the files."""

    def make(folder: Path = published, **changes: Any) -> dict[str, Any]:
        sources = [
            {"path": "laion/*.tar", "task": "caption"},
            {"path": "laion_coco", "task": "caption", "columns": {"caption": "top_caption"}},
            {"path": "mix665k.json", "root": "."},
            {"path": "coco_detection.jsonl", "root": "coco", "task": "detection"},
        ]
        text = {"path": "refinedweb/*.parquet", "type": "text", "columns": {"text": "content"}}
        plan: dict[str, Any] = document(data_root=str(folder), steps=None, epochs=float(EPOCHS), max_tokens=200)
        plan["data"] = {
            "images": {"mixture": {"sources": sources, "remainder": "keep"}, "batch_size": BATCH, "weight": 1.0},
            "texts": {
                "mixture": {"sources": [text], "over_length": "continue", "locality": 4},
                "batch_size": BATCH // 2,
                "weight": 0.5,
            },
        }
        return {**plan, **changes}

    return make


def exact(folder: Path | str) -> list[dict[str, Any]]:
    return [{key: record[key] for key in EXACT} for record in read_log(Path(folder))]


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_published_files_in_one_run(recipe, run_processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, list[str]]] = []
    read = Streams.read

    def recording(self: Streams) -> Any:
        found = read(self)
        seen.append(found.ids)
        return found

    straight = recipe(output=str(tmp_path / "straight"))
    with monkeypatch.context() as patched:
        patched.setattr(Streams, "read", recording)
        assert train(TrainPlan(**straight)).status == "done"
    expected = exact(straight["output"])
    images = [name for ids in seen for name in ids["images"]]
    epoch = Counter(images[: len(images) // EPOCHS])
    assert set(epoch.values()) == {1}
    assert Counter(name.partition(":")[0] for name in epoch) == COUNTS
    assert Counter(images) == Counter(dict.fromkeys(epoch, EPOCHS))
    texts = [name for ids in seen for name in ids["texts"]]
    starts = range(0, len(texts) - NUM_TEXTS + 1, NUM_TEXTS)
    assert len(starts) >= EPOCHS
    assert all(len(set(texts[start : start + NUM_TEXTS])) == NUM_TEXTS for start in starts)
    assert not [record for record in read_log(Path(straight["output"])) if record["truncated"] or record.get("bad")]

    killed = recipe(output=str(tmp_path / "killed"))
    assert run_processes(killed, at=4, kill="SIGKILL") == [-signal.SIGKILL]
    assert run_processes(killed | {"num_workers": 2}, at=7, kill="SIGKILL") == [-signal.SIGKILL]
    run_processes(killed | {"num_workers": 1})
    assert exact(killed["output"]) == expected

    changing = recipe(output=str(tmp_path / "changing"), num_workers=1)
    assert run_processes(changing, 2, at=4, kill="SIGKILL")[0] == -signal.SIGKILL  # the other one may see it end first
    assert run_processes(changing | {"num_workers": 0}, 1, at=7, kill="SIGKILL") == [-signal.SIGKILL]
    run_processes(changing | {"num_workers": 2}, 2)
    found = exact(changing["output"])
    assert [record["data"] for record in found] == [record["data"] for record in expected]
    losses = [record["loss"] for record in expected]
    assert [record["loss"] for record in found] == pytest.approx(losses, abs=PARALLEL_ATOL)


def test_changed_and_cut_shards_are_refused_by_name(recipe, recorder, published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "copy"))
    plan = recipe(folder, stop_after=2)
    train(TrainPlan(**plan))
    changes = {
        "laion/00001.tar": lambda data: data.replace(b"thing 1 3", b"thing 9 9"),
        "refinedweb/0.parquet": lambda data: data[: len(data) // 2],
        "laion/00000.tar": lambda data: data[: len(data) // 2],
        "mix665k.json": lambda data: data[: len(data) // 2],
        "coco_detection.jsonl": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    }
    for name, change in changes.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(change(whole))
        with pytest.raises((TrainingError, DataError), match=name.replace(".", r"\.")):
            train(TrainPlan(**plan))
        (folder / name).write_bytes(whole)
    shutil.copy(published / "coco_detection.jsonl", folder)

    def cut(record: Any) -> None:
        if record["step"] == 2:
            os.truncate(folder / "laion" / "00000.tar", 5000)
            os.truncate(folder / "laion" / "00001.tar", 5000)

    with pytest.raises(ShardChangedError, match=r"laion/0000\d\.tar: the file has changed or been cut"):
        train(TrainPlan(**plan | {"stop_after": None}), callbacks=[recorder(cut)])
