"""Data: converting a million COCO annotations (records/s, peak RssAnon).

The competitor of the converter loads the whole file with ``json.loads`` and groups in dictionaries, then words the
samples with the same formatter: what bounded memory costs in time, and saves in memory.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Case, Context, Sample
from benchmarks.process import in_fresh_process

DEVICES = ("cpu",)
ANNOTATIONS = 1_000_000
ANNOTATIONS_PER_IMAGE = 7  # COCO train2017: 860,001 on 117,266 images
CATEGORIES = 80


def cases(context: Context) -> Iterator[Case]:
    path = context.scratch / "instances.json"
    count = context.pick(ANNOTATIONS, 2_000)
    _write_coco(path, count)
    yield Case(
        f"convert {count} COCO annotations, {path.stat().st_size / 1e6:.0f} MB, detection",
        {
            "sphinxkit": _candidate("convert_ours", path, context),
            "json.loads + dict": _candidate("convert_plain", path, context),
        },
        amount=count,
        unit="records",
        tolerance=0,
        repeats=2,
        max_seconds=300,
    )
    path.unlink()


def _write_coco(path: Path, count: int) -> None:
    draw = random.Random(0)
    num_images = max(1, count // ANNOTATIONS_PER_IMAGE)
    with path.open("w") as file:
        file.write('{"info": {}, "annotations": [')
        for index in range(count):
            x, y, width, height = (
                draw.randrange(500),
                draw.randrange(400),
                draw.randrange(1, 140),
                draw.randrange(1, 80),
            )
            record = {
                "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                "area": width * height,
                "iscrowd": 0,
                "image_id": draw.randrange(num_images),
                "bbox": [x, y, width, height],
                "category_id": draw.randrange(CATEGORIES),
                "id": index,
            }
            file.write((",\n" if index else "") + json.dumps(record))
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in range(num_images)]
        names = [{"id": i, "name": f"thing {i}"} for i in range(CATEGORIES)]
        file.write(f'], "images": {json.dumps(images)}, "categories": {json.dumps(names)}}}')


def _candidate(function: str, path: Path, context: Context) -> Callable[[], Sample]:
    def call() -> Sample:
        target = f"benchmarks.bench_data:{function}"
        sample = in_fresh_process(target, timeout=600, fresh=not context.micro, path=str(path))
        return dataclasses.replace(sample, output=[sample.extra["conversations"]])

    return call


def convert_ours_setup(path: str) -> None:
    """Import outside the clock."""
    import sphinxkit.data.converters  # noqa: F401


def convert_ours(path: str) -> Sample:
    """``sphinxkit convert-data``, without the command line."""
    from sphinxkit.data.converters import Source, convert_data

    begin = time.perf_counter()
    report = convert_data(Source(Path(path)), "coco", "detection", Path(path).with_suffix(".ours.jsonl"))
    return Sample(time.perf_counter() - begin, extra={"conversations": report.num_written})


convert_plain_setup = convert_ours_setup


def convert_plain(path: str) -> Sample:
    """Everything in memory."""
    from sphinxkit.data.conversations import write_conversation
    from sphinxkit.formatters import tasks
    from sphinxkit.formatters.tasks import DetectionSample
    from sphinxkit.geometry import Box, ImageGeometry

    begin = time.perf_counter()
    task, written = tasks.create("detection"), 0
    content = json.loads(Path(path).read_text())
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    groups: dict[tuple[int, int], list[Box]] = {}
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        key = (record["image_id"], record["category_id"])
        groups.setdefault(key, []).append(Box(x, y, x + width, y + height))
    with Path(path).with_suffix(".plain.jsonl").open("w") as file:
        for (image_id, category), boxes in groups.items():
            image = images[image_id]
            geometry = ImageGeometry(image["width"], image["height"])
            example = task.format(DetectionSample(names[category], tuple(boxes), geometry))
            messages = [
                {"role": "user", "content": example.instruction},
                {"role": "assistant", "content": example.answer},
            ]
            record = write_conversation(str(image_id), messages, image=image["file_name"], task="detection")
            file.write(json.dumps(record) + "\n")
            written += 1
    return Sample(time.perf_counter() - begin, extra={"conversations": written})
