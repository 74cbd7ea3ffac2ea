from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.conversations import read_conversation
from sphinxkit.data.converters import Problems, Source, convert_records
from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.geometry import ImageGeometry, Point

IMAGES = [
    {"license": 3, "file_name": "000000397133.jpg", "height": 100, "width": 200, "id": 397133},
    {"license": 1, "file_name": "000000037777.jpg", "height": 230, "width": 352, "id": 37777},
]
CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person", "keypoints": list(COCO_KEYPOINTS), "skeleton": [[16, 14]]},
    {"supercategory": "animal", "id": 18, "name": "dog"},
]


def instance(number: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {
        "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
        "area": 9.5,
        "iscrowd": 0,
        "image_id": image,
        "bbox": bbox,
        "category_id": category,
        "id": number,
        **more,
    }


INSTANCES = [
    instance(1, 397133, 18, [20, 10, 100, 50]),
    instance(2, 37777, 1, [0, 0, 10.5, 20]),
    instance(3, 397133, 1, [140, 10, 40, 60]),
    instance(4, 397133, 18, [150, 20, 20, 20]),
    instance(5, 397133, 1, [0, 0, 200, 100], iscrowd=1, segmentation={"counts": [1, 2], "size": [100, 200]}),
]


def write(path: Path, annotations: list[Any], *, order: str = "iac", **more: Any) -> Path:
    parts = {"i": ("images", IMAGES), "a": ("annotations", annotations), "c": ("categories", CATEGORIES)}
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1}],
        **{parts[key][0]: parts[key][1] for key in order},
        **more,
    }
    path.write_text(json.dumps(content, indent=0))
    return path


def run(path: Path, name: str, task: str | None = None) -> tuple[list[dict[str, Any]], Problems]:
    problems = Problems()
    return list(convert_records(Source(path), name, task, problems, wording=0)), problems


@pytest.mark.parametrize("order", ["iac", "aic", "cai"])
def test_detection_one_sample_per_image_and_category(tmp_path: Path, order: str) -> None:
    records, problems = run(write(tmp_path / "instances.json", INSTANCES, order=order), "coco", "detection")
    assert problems.count == 0
    assert [(record["id"], record["image"]) for record in records] == [
        ("397133:dog", "000000397133.jpg"),
        ("397133:person", "000000397133.jpg"),
        ("37777:person", "000000037777.jpg"),
    ]
    assert records[0]["task"] == "detection"
    question, answer = read_conversation(records[0], "x")
    assert question["content"] == "<image>\nDetect all dog shown in the image."
    # padded to 200 x 200: 50 px above
    assert answer["content"] == "<p>dog</p>[0.100,0.300,0.600,0.550;0.750,0.350,0.850,0.450]"


def test_pose_by_hand_and_round_trip(tmp_path: Path) -> None:
    flat = [0.0] * 51
    flat[0:3] = [30, 20, 2]  # nose, visible
    flat[39:42] = [60, 50, 1]  # left knee, hidden but annotated
    people = [
        instance(7, 397133, 1, [20, 10, 100, 50], keypoints=flat, num_keypoints=2),
        instance(8, 397133, 1, [20, 10, 100, 50], keypoints=[0] * 51, num_keypoints=0),
    ]
    records, problems = run(write(tmp_path / "k.json", people), "coco_keypoints")
    assert (problems.count, len(records)) == (0, 1)
    question, answer = read_conversation(records[0], "x")
    assert question["content"].endswith("person in the region [0.100,0.300,0.600,0.550].")
    assert answer["content"] == "<p>nose</p>[0.150,0.350] <p>left_knee</p>[0.300,0.500]"
    (keypoints,) = tasks.create("pose").parse(answer["content"], ImageGeometry(200, 100)).items
    assert keypoints.points == {"nose": Point(30, 20), "left_knee": Point(60, 50)}


def test_captions(tmp_path: Path) -> None:
    captions = [
        {"image_id": 37777, "id": 9, "caption": "A kitchen with a stove.\n"},
        {"image_id": 397133, "id": 10, "caption": "A man."},
    ]
    records, problems = run(write(tmp_path / "captions.json", captions), "coco", "caption")
    assert problems.count == 0
    assert [record["conversations"][1]["value"] for record in records] == ["A kitchen with a stove.", "A man."]
    assert [record["id"] for record in records] == ["9", "10"]


@pytest.mark.parametrize(("name", "labels"), [("publaynet", ["text", "title"]), ("doclaynet", ["Text", "Page-footer"])])
def test_layout(tmp_path: Path, name: str, labels: list[str]) -> None:
    boxes = [instance(1, 397133, 1, [20, 10, 100, 50]), instance(2, 397133, 2, [140, 10, 40, 60])]
    categories = [{"id": index, "name": label, "supercategory": ""} for index, label in enumerate(labels, 1)]
    path = write(tmp_path / "layout.json", boxes, order="ia", categories=categories)
    (record,), problems = run(path, name)
    assert (problems.count, record["task"]) == (0, "layout")
    result = tasks.create("layout", classes=name).parse(record["conversations"][1]["value"], ImageGeometry(200, 100))
    assert result.is_strict
    found = {item.phrase: [round(value) for value in dataclasses.astuple(item.boxes[0])] for item in result.items}
    assert found == {labels[0]: [20, 10, 120, 60], labels[1]: [140, 10, 180, 70]}


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (instance(9, 5, 18, [1, 1, 2, 2]), "annotations: id 9: image_id 5 is not among the images"),
        (instance(9, 397133, 5, [1, 1, 2, 2]), "annotations: id 9: category_id 5 is not among the categories"),
        (instance(9, 397133, 18, [1, 1, 0, 2]), "annotations: id 9: the box has no area: [1, 1, 0, 2]"),
        (instance(9, 397133, 18, [1, 1, 2]), "annotations: id 9: the box must be [x, y, width, height], got [1, 1, 2]"),
        (instance(9, 397133, 18, [1, 1, 2, "x"]), "annotations: id 9: the box must have four finite numbers"),
        (instance(9, 397133, 18, [1, 1, 2, float("nan")]), "annotations: id 9: the box must have four finite numbers"),
        (instance(9, 397133, 18, [190, 10, 50, 5]), "lies outside the image of 200x100"),
        ({"image_id": 397133, "category_id": 18}, "annotations: 'bbox' must be a list, got None"),
        (
            {"image_id": None, "category_id": 18, "bbox": []},
            "annotations: 'image_id' must be an integer or a text, got None",
        ),
        (3, "annotations: expected an object, got int"),
    ],
)
def test_malformed_annotations_are_left_out_with_their_line(tmp_path: Path, annotation: Any, reason: str) -> None:
    path = write(tmp_path / "instances.json", [INSTANCES[0], annotation], order="ica")
    records, problems = run(path, "coco", "detection")
    assert len(records) == 1
    (found,) = problems.listed
    assert reason in found.reason
    assert found.file == str(path)
    start = json.dumps(annotation, indent=0).splitlines()[0]
    assert path.read_text().splitlines()[found.line - 1].startswith(start)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            {"images": [{"id": 1, "file_name": "", "width": 1, "height": 1}]},
            "images: id 1: 'file_name' must be a text that is not empty",
        ),
        (
            {"images": [{"id": 1, "file_name": "a", "width": 0, "height": 1}]},
            "images: id 1: width and height must be positive, got 0x1",
        ),
        (
            {"images": [{"id": 1, "file_name": "a", "width": 1}]},
            "images: id 1: 'height' must be a finite number, got None",
        ),
        ({"categories": [{"id": 1}]}, "categories: id 1: 'name' must be a text"),
    ],
)
def test_malformed_images_and_categories(tmp_path: Path, members: dict[str, Any], reason: str) -> None:
    content = {"images": IMAGES, "annotations": [], "categories": CATEGORIES, **members}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    _, problems = run(path, "coco", "detection")
    assert [reason in problem.reason for problem in problems.listed] == [True]


@pytest.mark.parametrize(
    ("keypoints", "category", "reason"),
    [
        ([1, 2], 1, "'keypoints' must be triples of numbers, got 2 values"),
        ([1, 2, 2], 1, "1 key points where the category names 17"),
        ([1, 2, 2], 18, "'keypoints' must be a list, got None"),
        ([500, 2, 2] + [0] * 48, 1, "lies outside the image"),
    ],
)
def test_malformed_poses(tmp_path: Path, keypoints: list[Any], category: int, reason: str) -> None:
    person = instance(1, 397133, category, [20, 10, 100, 50], keypoints=keypoints)
    records, problems = run(write(tmp_path / "k.json", [person]), "coco", "pose")
    assert records == []
    assert reason in problems.listed[0].reason


# -- files that were joined -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["detection", "pose", "caption"])
@pytest.mark.parametrize("order", ["iac", "aic"])
def test_boxes_of_a_repeated_image_id_are_left_out(tmp_path: Path, task: str, order: str) -> None:
    images = [*IMAGES, {"id": 397133, "file_name": "b.jpg", "height": 480, "width": 640}]
    annotations = [
        instance(71, 397133, 1, [20, 10, 100, 50], keypoints=[30, 20, 2] * 17, caption="one"),
        instance(72, 37777, 1, [0, 0, 10, 20], keypoints=[3, 2, 2] * 17, caption="two"),
        instance(73, 397133, 1, [300, 300, 50, 60], keypoints=[310, 310, 2] * 17, caption="three"),
    ]
    records, problems = run(write(tmp_path / "joined.json", annotations, order=order, images=images), "coco", task)
    assert [record["image"] for record in records] == ["000000037777.jpg"]
    assert [problem.reason for problem in problems.listed] == [
        "images: id 397133 is there 2 times, with different content; what refers to it is left out",
        *(
            f"annotations: id {number}: image_id 397133 is there more than once among the images, "
            "with different content"
            for number in (71, 73)
        ),
    ]


def test_an_image_that_is_listed_twice_keeps_its_boxes(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.json", [INSTANCES[0], INSTANCES[0]], images=[*IMAGES, IMAGES[0]])
    (record,), problems = run(path, "coco", "detection")
    assert record["conversations"][1]["value"] == "<p>dog</p>[0.100,0.300,0.600,0.550]"  # the box is not there twice
    assert [problem.reason for problem in problems.listed] == [
        "images: id 397133 is there 2 times, each time the same",
        "annotations: id 1: is there more than once, with the same content",
    ]


def test_a_person_does_not_become_a_cat(tmp_path: Path) -> None:
    same, other = CATEGORIES[1], {"id": 1, "name": "cat"}
    path = write(tmp_path / "instances.json", INSTANCES, categories=[*CATEGORIES, same, other, CATEGORIES[0]])
    records, problems = run(path, "coco", "detection")
    assert [record["id"] for record in records] == ["397133:dog"]
    reasons = [problem.reason for problem in problems.listed]
    assert reasons[0] == "categories: id 18 is there more than once, each time the same"
    left_out = "categories: id 1 is there more than once, with different content; what refers to it is left out"
    assert reasons[1:3] == [left_out] * 2
    assert sorted(reasons[3:]) == [
        f"annotations: id {number}: category_id 1 is there more than once, with different content" for number in (2, 3)
    ]


def test_one_bad_key_point_costs_that_one(tmp_path: Path) -> None:
    flat: list[Any] = [0] * 51
    flat[0:12] = [30, 20, 2, 500, 20, 2, "x", 20, 2, 40, 30, float("nan")]  # nose, left eye, right eye, left ear
    flat[39:42] = [60, 50, 1]
    person = instance(7, 397133, 1, [20, 10, 100, 50], keypoints=flat)
    (record,), problems = run(write(tmp_path / "k.json", [person]), "coco", "pose")
    assert record["conversations"][1]["value"] == "<p>nose</p>[0.150,0.350] <p>left_knee</p>[0.300,0.500]"
    reasons = [problem.reason for problem in problems.listed]
    assert len(reasons) == 3
    assert reasons[0].startswith(
        "annotations: id 7: key point left_eye: task 'pose': Point(x=500.0, y=20.0) lies outside"
    )
    assert reasons[1] == "annotations: id 7: key point right_eye: expected three finite numbers, got ['x', 20, 2]"
    assert "key point left_ear: expected three finite numbers, got [40, 30, nan]" in reasons[2]


# -- crowds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "is_kept"),
    [(0, True), ("0", True), (False, True), (None, True), (1, False), ("1", False), (True, False), (1.0, False)],
)
def test_crowds_are_left_out(tmp_path: Path, value: Any, is_kept: bool) -> None:
    annotations = [instance(1, 397133, 18, [20, 10, 100, 50], iscrowd=value)]
    records, problems = run(write(tmp_path / "instances.json", annotations), "coco", "detection")
    assert (len(records) == 1, problems.count) == (is_kept, 0)


@pytest.mark.parametrize("value", ["no", "", 2, [], {}])
def test_a_crowd_that_is_neither(tmp_path: Path, value: Any) -> None:
    annotations = [instance(1, 397133, 18, [20, 10, 100, 50], iscrowd=value)]
    records, problems = run(write(tmp_path / "instances.json", annotations), "coco", "detection")
    assert records == []
    assert problems.listed[0].reason == f"annotations: id 1: 'iscrowd' must be 0 or 1, got {value!r}"


def test_lvis(tmp_path: Path) -> None:
    """Layout of lvis_v1_train.json: images have no file_name."""
    images = [
        {
            "id": 391895,
            "coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg",
            "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
            "width": 200,
            "height": 100,
            "license": 3,
            "date_captured": "2013-11-14 11:18:45",
            "neg_category_ids": [3],
            "not_exhaustive_category_ids": [2],
        }
    ]
    names = ["bow_(weapon)", "shoe", "cab"]
    categories = [
        {"id": index, "name": name, "synset": f"{name}.n.01", "synonyms": [name], "def": "x", "frequency": "f"}
        for index, name in enumerate(names, 1)
    ]
    boxes = [([20, 10, 100, 50], 1), ([0, 0, 10, 10], 2)]
    annotations = [
        {"id": 7 + index, "image_id": 391895, "category_id": category, "bbox": bbox, "area": 9.5, "segmentation": [[1]]}
        for index, (bbox, category) in enumerate(boxes)
    ]
    path = tmp_path / "lvis_v1_train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    records, problems = run(path, "lvis")
    assert problems.count == 0
    (record,) = records  # shoes are annotated only in part
    assert (record["id"], record["image"]) == ("391895:bow (weapon)", "train2017/000000391895.jpg")
    assert record["conversations"][0]["value"] == "<image>\nDetect all bow (weapon) shown in the image."
    assert record["conversations"][1]["value"] == "<p>bow (weapon)</p>[0.100,0.300,0.600,0.550]"


def test_objects365_patches(tmp_path: Path) -> None:
    image = {"height": 100, "id": 420917, "license": 5, "width": 200, "url": ""}
    annotation = {"id": 51, "iscrowd": 0, "isfake": 0, "area": 9.5, "isreflected": 0, "image_id": 420917}
    content = {
        "images": [{**image, "file_name": "images/v1/patch8/objects365_v1_00420917.jpg"}],
        "annotations": [{**annotation, "category_id": 84, "bbox": [20.5, 10, 100, 50]}],
        "categories": [{"name": "Cabinet/shelf", "id": 84}],
    }
    path = tmp_path / "zhiyuan_objv2_train.json"
    path.write_text(json.dumps(content))
    ((record,), problems) = run(path, "Objects365")
    assert problems.count == 0
    assert record["image"] == "patch8/objects365_v1_00420917.jpg"
    content["images"][0]["file_name"] = "http://[x"
    path.write_text(json.dumps(content))
    records, problems = run(path, "objects365")
    assert records == []
    assert problems.listed[0].reason == "images: id 420917: not a URL: 'http://[x'"
