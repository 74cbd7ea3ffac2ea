from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.converters import FORMATS, Problems, Source, convert_data, convert_records
from sphinxkit.data.converters.base import LISTED
from sphinxkit.data.mixture import Mixture, MixtureSource
from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    records = {
        str(index): {"question": f"q{index}", "imageId": index, "answer": "a" * (index != 1)} for index in range(4)
    }
    path = tmp_path / "gqa.json"
    path.write_text(json.dumps(records, indent=0))
    return path


def test_every_format_has_tasks_that_exist() -> None:
    assert {task for converters in FORMATS.values() for task in converters} - {"*"} <= set(tasks.names())


def test_a_converted_file_is_a_source_of_a_mixture(gqa: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "gqa.jsonl"
    report = convert_data(Source(gqa), "gqa", output=output, image_prefix="images/")
    assert (report.num_written, report.num_malformed, report.task) == (3, 1, "vqa")
    mixture = Mixture([MixtureSource(str(output), root=str(tmp_path))])
    samples = [mixture.read(ref) for ref in mixture.order()]
    assert {sample.image for sample in samples} == {tmp_path / "images" / f"{index}.jpg" for index in (0, 2, 3)}
    assert {sample.task for sample in samples} == {"vqa"}


def test_malformed_records_are_listed_in_a_file_of_their_own(gqa: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    report = convert_data(Source(gqa), "gqa", output=output)
    listing = tmp_path / "o.jsonl.malformed.jsonl"
    assert report.malformed_file == str(listing)
    reason = "question 1: 'answer' must be a text that is not empty, got ''"
    wanted = {"file": str(gqa), "line": 7, "reason": reason}
    assert [json.loads(line) for line in listing.read_text().splitlines()] == [wanted]
    assert json.loads(json.dumps(report.to_dict()))["malformed"] == [wanted]
    fixed = tmp_path / "fixed.json"
    fixed.write_text(gqa.read_text().replace('"answer": ""', '"answer": "b"'))
    assert convert_data(Source(fixed), "gqa", output=output).malformed_file is None
    assert not listing.exists()


def test_strict_is_fatal_and_leaves_nothing_behind(gqa: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"gqa\.json:7: question 1: 'answer' must be a text"):
        convert_data(Source(gqa), "gqa", output=tmp_path / "o.jsonl", strict=True)
    assert sorted(tmp_path.iterdir()) == before


def test_an_old_output_survives_a_failure(gqa: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    output.write_text("old")
    gqa.write_text(gqa.read_text()[:-3])
    with pytest.raises(DataError, match=r"gqa\.json:\d+: the file ends inside this record"):
        convert_data(Source(gqa), "gqa", output=output)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gqa.json", "o.jsonl"]


def test_to_a_stream_with_a_limit_and_progress(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({str(i): {"question": "q", "imageId": i, "answer": "a"} for i in range(2500)}))
    seen: list[int] = []
    stream = io.StringIO()
    report = convert_data(Source(path), "gqa", stream=stream, limit=2400, progress=seen.append)
    assert (report.num_written, len(stream.getvalue().splitlines()), seen) == (2400, 2400, [1000, 2000])
    assert report.output is None


def test_only_the_first_malformed_records_are_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({str(index): 1 for index in range(LISTED + 5)}))
    report = convert_data(Source(path), "gqa", output=tmp_path / "o.jsonl")
    assert (report.num_malformed, len(report.malformed)) == (LISTED + 5, LISTED)
    assert len((tmp_path / "o.jsonl.malformed.jsonl").read_text().splitlines()) == LISTED + 5


def test_a_sample_that_the_task_refuses_is_malformed(tmp_path: Path) -> None:
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}]
    images = [{"id": 1, "file_name": "a.png", "width": 10, "height": 10}]
    path = tmp_path / "l.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "stamp"}]}))
    problems = Problems()
    assert list(convert_records(Source(path), "publaynet", None, problems)) == []
    assert "1: task 'layout': class 'stamp' is unknown" in problems.listed[0].reason


def test_names_of_formats_are_forgiving(gqa: Path) -> None:
    assert convert_data(Source(gqa), "GQA", stream=io.StringIO()).format == "gqa"
    for name, message in (("Visual Genome", "image_data.json: cannot be read"), ("RefCOCO+", "refs")):
        with pytest.raises(DataError, match=message):
            convert_data(Source(gqa), name, stream=io.StringIO())


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("coc", None, "unknown format 'coc'; did you mean 'coco'"),
        ("coco", "poze", "format 'coco' has no task 'poze'; did you mean 'pose'.* It has: detection, pose, caption"),
    ],
)
def test_unknown_names(gqa: Path, name: str, task: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert_data(Source(gqa), name, task, stream=io.StringIO())


def test_all_wordings_are_used_and_drawn_by_the_record(tmp_path: Path) -> None:
    def convert(numbers: range, **options: Any) -> dict[str, str]:
        path = tmp_path / "gqa.json"
        path.write_text(json.dumps({str(n): {"question": "Why?", "imageId": n, "answer": "a"} for n in numbers}))
        records = convert_records(Source(path), "gqa", None, Problems(strict=True), **options)
        return {record["id"]: record["conversations"][0]["value"] for record in records}

    wordings = {f"<image>\n{wording.format(question='Why?')}" for wording in tasks.create("vqa").wordings}
    drawn = convert(range(300))
    counts = {wording: list(drawn.values()).count(wording) for wording in wordings}
    assert sum(counts.values()) == 300
    assert min(counts.values()) > 70  # 100 each on average; fixed, as the draw depends on ids alone
    # a record's wording does not depend on the others
    assert convert(range(299, 99, -1)) == {key: drawn[key] for key in map(str, range(100, 300))}
    assert set(convert(range(9), wording=2).values()) == {"<image>\nWhy?\nGive a short answer."}
    with pytest.raises(DataError, match=r"task 'vqa': wording 3 does not exist, there are 3"):
        convert(range(9), wording=3)


def test_nowhere_to_read_or_write(gqa: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither an output file nor a stream"):
        convert_data(Source(gqa), "gqa")
    with pytest.raises(DataError, match="none: there is no such file or folder"):
        convert_data(Source(tmp_path / "none"), "gqa", stream=io.StringIO())


NUM_ANNOTATIONS = 200_000  # benchmarks/bench_data.py takes a million
NUM_IMAGES = 20_000
MEMORY_BOUND = 80_000  # KiB of anonymous memory beyond the start: SQLite's cache, one chunk and room; not O(records)
WATCH = """
import sys
from pathlib import Path
from sphinxkit.data.converters import Source, convert_data

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak = start = anonymous()

def progress(count):
    global peak
    peak = max(peak, anonymous())

report = convert_data(Source(Path(sys.argv[1])), "coco", "detection", Path(sys.argv[2]), progress=progress)
print(report.num_written, report.num_malformed, max(peak, anonymous()) - start)
"""


@pytest.mark.slow
def test_annotations_stream_in_bounded_memory(tmp_path: Path) -> None:
    import random
    import subprocess
    import sys

    draw = random.Random(0)
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write('{"annotations": [')
        for index in range(NUM_ANNOTATIONS):
            box = [draw.randrange(500), draw.randrange(400), draw.randrange(1, 100), draw.randrange(1, 80)]
            record = {
                "id": index,
                "image_id": draw.randrange(NUM_IMAGES),
                "category_id": draw.randrange(80),
                "bbox": box,
            }
            file.write(("," if index else "") + json.dumps(record) + "\n")
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(NUM_IMAGES)]
        file.write('], "images": ' + json.dumps(images))
        file.write(', "categories": ' + json.dumps([{"id": i, "name": f"c{i}"} for i in range(80)]) + "}")
    command = [sys.executable, "-c", WATCH, str(path), str(tmp_path / "o.jsonl")]
    written, malformed, memory = map(
        int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    )
    assert malformed == 0
    assert 0.9 * NUM_ANNOTATIONS < written < NUM_ANNOTATIONS  # a few images have two of a category
    assert memory < MEMORY_BOUND


# What a file may hold in the place of a text, a number, a list or an object; 10**400 is beyond a float, "\ud800" is
# half of a surrogate pair, which JSON can hold and UTF-8 cannot.
ODD_VALUES = (None, [], {}, "", "x", -1, 0, 1.5, True, float("inf"), float("nan"), "\ud800", [1], {"a": 1}, 10**400)

COCO = {
    "images": [{"id": 1, "file_name": "1.jpg", "width": 200, "height": 100}],
    "annotations": [{"id": 2, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 40], "iscrowd": 0}],
    "categories": [{"id": 3, "name": "text", "keypoints": ["nose"]}],
}
BODY = {**COCO["annotations"][0], "keypoints": [5, 6, 2]}
SAID = {**COCO["annotations"][0], "caption": "a dog"}
GENOME_BOX = {"x": 1, "y": 2, "w": 3, "h": 4}
LAYOUTS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "detection": ("coco", "detection", {"a.json": COCO}),
    "pose": ("coco", "pose", {"a.json": {**COCO, "annotations": [BODY]}}),
    "caption": ("coco", "caption", {"a.json": {**COCO, "annotations": [SAID]}}),
    "layout": ("publaynet", None, {"a.json": COCO}),
    "gqa": ("gqa", None, {"a.json": {"7": {"imageId": "1", "question": "red?", "answer": "yes"}}}),
    "textcaps": ("textcaps", None, {"a.json": {"data": [{"image_id": "b", "caption_str": "c", "caption_id": 1}]}}),
    "ocrvqa": (
        "ocrvqa",
        None,
        {"a.json": {"7": {"imageURL": "http://x/y.jpg", "questions": ["q"], "answers": ["a"], "split": 1}}},
    ),
    "textvqa": (
        "textvqa",
        None,
        {
            "a.json": {"data": [{"image_id": "b", "question": "q", "question_id": 1, "answers": ["a", "a"]}]},
            "companion.json": {"data": [{"image_id": "b", "ocr_tokens": ["A", "B"]}]},
        },
    ),
    "docvqa": (
        "docvqa",
        None,
        {"a.json": {"data": [{"questionId": 1, "question": "q", "image": "documents/a.png", "answers": ["a"]}]}},
    ),
    "chartqa": ("chartqa", None, {"a.json": [{"imgname": "a.png", "query": "q", "label": "14"}]}),
    "scienceqa": (
        "scienceqa",
        None,
        {
            "a.json": {
                "7": {
                    **{"question": "q", "choices": ["a", "b"], "answer": 1, "hint": "h", "image": "image.png"},
                    "split": "train",
                }
            }
        },
    ),
    **{
        f"aokvqa_{task}": (
            "aokvqa",
            task,
            {
                "a.json": [
                    {
                        **{"split": "val", "image_id": 1, "question_id": "x", "question": "q", "choices": ["a", "b"]},
                        **{"correct_choice_idx": 1, "direct_answers": ["a", "b"]},
                    }
                ]
            },
        )
        for task in ("multiple_choice", "vqa")
    },
    "lvis": (
        "lvis",
        None,
        {
            "a.json": {
                **COCO,
                "images": [
                    {
                        **{"id": 1, "coco_url": "http://x/train2017/1.jpg", "width": 200, "height": 100},
                        "not_exhaustive_category_ids": [4],
                    }
                ],
            }
        },
    ),
    "objects365": ("objects365", None, {"a.json": COCO}),
    "genome_questions": (
        "visual_genome",
        "vqa",
        {
            "a.json": [{"id": 1, "qas": [{"qa_id": 2, "question": "q", "answer": "a", "image_id": 1}]}],
            "image_data.json": [{"image_id": 1, "url": "http://x/VG_100K/1.jpg", "width": 20, "height": 10}],
        },
    ),
    "llava": (
        "llava",
        None,
        {
            "a.json": [
                {
                    "id": "1",
                    "image": "1.jpg",
                    "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                }
            ]
        },
    ),
    "vqav2": (
        "vqav2",
        None,
        {
            "a.json": {
                "data_subtype": "val2014",
                "questions": [{"image_id": 1, "question": "q", "question_id": 10}],
            },
            "companion.json": {"annotations": [{"question_id": 10, "answers": [{"answer": "a"}]}]},
        },
    ),
    "refcoco": (
        "refcoco",
        None,
        {
            "instances.json": COCO,
            "refs.json": [
                {"image_id": 1, "ann_id": 2, "split": "train", "sentences": [{"sent": "dog", "sent_id": 1}]},
            ],
        },
    ),
    "genome_regions": (
        "visual_genome",
        "rec",
        {
            "a.json": [{"id": 1, "regions": [{"region_id": 2, "phrase": "dog", **GENOME_BOX}]}],
            "image_data.json": [{"image_id": 1, "url": "http://x/VG_100K/1.jpg", "width": 20, "height": 10}],
        },
    ),
    "genome_relations": (
        "visual_genome",
        "relation",
        {
            "a.json": [
                {
                    "image_id": 1,
                    "relationships": [
                        {
                            "predicate": "ON",
                            "subject": {"name": "dog", **GENOME_BOX},
                            "object": {"names": ["mat"], **GENOME_BOX},
                        }
                    ],
                }
            ],
            "image_data.json": [{"image_id": 1, "url": "http://x/VG_100K/1.jpg", "width": 20, "height": 10}],
        },
    ),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])  # every eleventh combination, or all
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_odd_value_anywhere_stops_a_conversion(tmp_path: Path, layout: str, step: int) -> None:
    name, task, files = LAYOUTS[layout]
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    folder = name == "refcoco"
    companion = tmp_path / "companion.json"
    source = Source(
        tmp_path if folder else tmp_path / "a.json",
        companion if companion.exists() else None,
        "train" if name in ("ocrvqa", "refcoco") else None,
    )
    assert len(list(convert_records(source, name, task, Problems(strict=True)))) == 1
    for file, content in files.items():
        for path, odd in list(itertools.product(places(content), ODD_VALUES))[::step]:
            changed = json.loads(json.dumps(content))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            (tmp_path / file).write_text(json.dumps(changed))
            problems = Problems()
            try:
                records = list(convert_records(source, name, task, problems))
            except DataError as error:  # the file itself is of another form
                assert len(path) == 1
                assert "expected" in str(error)  # noqa: PT017
                continue
            assert all(json.dumps(record, ensure_ascii=False).encode() for record in records)
            assert all(problem.reason.encode() for problem in problems.listed)
        (tmp_path / file).write_text(json.dumps(content))


def test_half_a_surrogate_pair_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "gqa.json"
    path.write_text(
        '{"1": {"imageId": "1", "question": "\\ud800?", "answer": "a"},\n'
        '"2": {"imageId": "\\ud800", "question": "q", "answer": "a"},\n'
        '"3": {"imageId": "\\u00e9", "question": "\\ud83d\\ude00", "answer": "a"}}'
    )
    report = convert_data(Source(path), "gqa", output=tmp_path / "out.jsonl")
    assert (report.num_written, report.num_malformed) == (1, 2)
    assert [problem.line for problem in report.malformed] == [1, 2]
    assert "half of a surrogate pair cannot be written" in report.malformed[0].reason
    assert r"'imageId' holds half of a surrogate pair: '\ud800'" in report.malformed[1].reason


def test_files_that_cannot_be_opened_are_named(gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out.jsonl: cannot be written: .*(Not a directory|File exists)"):
        convert_data(Source(gqa), "gqa", output=tmp_path / "file" / "out.jsonl")
    monkeypatch.setattr("os.fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(DataError, match=r"out.jsonl: cannot be written: .*No space left on device"):
        convert_data(Source(gqa), "gqa", output=tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "gqa.json"}


def test_an_output_is_not_one_of_the_inputs(gqa: Path, tmp_path: Path) -> None:
    before = gqa.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(gqa)
    for output in (gqa, link):
        with pytest.raises(DataError, match=r"output .* is the input; write to another file"):
            convert_data(gqa, "gqa", output=output)
    with pytest.raises(DataError, match="is the input"):
        convert_data(tmp_path, "vqav2", output=gqa, companion=gqa)
    assert gqa.read_bytes() == before
