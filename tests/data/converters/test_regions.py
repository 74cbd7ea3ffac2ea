from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.converters import Problems, Source, convert_records
from sphinxkit.data.converters.regions import read_entities
from sphinxkit.errors import DataError


def run(name: str, path: Path, task: str | None = None, **source: Any) -> tuple[list[dict[str, Any]], Problems]:
    problems = Problems()
    return list(convert_records(Source(path, **source), name, task, problems, wording=0)), problems


def turns(record: dict[str, Any]) -> tuple[str, str]:
    question, answer = (turn["value"] for turn in record["conversations"])
    return question.removeprefix("<image>\n"), answer


REFS = [
    {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": 0,
        "image_id": 581857,
        "split": "train",
        "category_id": 1,
        "sentences": [
            {"tokens": ["lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
            {"tokens": ["her"], "raw": "her", "sent_id": 1, "sent": "her"},
        ],
    },
    {"ann_id": 2, "ref_id": 1, "image_id": 581857, "split": "testA", "sentences": [{"sent_id": 2, "sent": "dog"}]},
]
INSTANCES = {
    "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 200, "height": 100}],
    "annotations": [{"id": 1719310, "bbox": [20, 10, 100, 50], "image_id": 581857}],
    "categories": [],
}


@pytest.fixture
def refcoco(tmp_path: Path) -> Path:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    with (tmp_path / "refs(unc).p").open("wb") as file:
        pickle.dump(REFS, file, protocol=2)
    return tmp_path


def test_refcoco_rec_and_reg(refcoco: Path) -> None:
    records, problems = run("refcoco", refcoco, split="train")
    assert problems.count == 0
    assert [record["id"] for record in records] == ["0", "1"]
    assert records[0]["image"] == "COCO_train2014_000000581857.jpg"
    assert turns(records[0]) == (
        "Please provide the bounding box coordinate of the region this sentence describes: the lady.",
        "[0.100,0.300,0.600,0.550]",
    )
    records, _ = run("refcoco", refcoco, "reg", split="train")
    question, answer = turns(records[1])
    assert question.endswith("for this region: [0.100,0.300,0.600,0.550].")
    assert answer == "her"


def test_refcoco_as_json_and_with_companion(refcoco: Path) -> None:
    wanted = run("refcoco", refcoco, split="train")[0]
    (refcoco / "refs(unc).p").unlink()
    (refcoco / "refs.json").write_text(json.dumps(REFS))
    assert run("refcoco", refcoco, split="train")[0] == wanted
    path = refcoco / "instances.json"
    assert run("refcoco", path, companion=refcoco / "refs.json", split="train")[0] == wanted


def test_refcoco_faults(refcoco: Path) -> None:
    records, problems = run("refcoco", refcoco)
    assert len(records) == 2
    assert [(p.line, p.reason) for p in problems.listed] == [
        (0, "expression 1: ref_id 1: image_id 581857 or ann_id 2 is not in instances.json")
    ]
    (refcoco / "refs(google).p").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"expected one refs\(\.\.\.\)\.p or refs\*\.json, found refs\(google\)\.p, refs"
    ):
        run("refcoco", refcoco)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/sphinxkit-must-not-exist"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([Evil()], protocol=2), r"refs\.p: not a pickle of plain data: .* is not plain data"),
        (b"\x80\x02]r\xff\xff\xff\x1f.", r"refs\.p: not a pickle of plain data: it numbers an object 536870911"),
        (b"\x80\x02]", r"refs\.p: not a pickle of plain data"),
        (pickle.dumps({"a": 1}), r"refs\.p: expected a list of referring expressions, got dict"),
    ],
)
def test_a_pickle_can_build_nothing_but_plain_data(refcoco: Path, content: bytes, message: str) -> None:
    (refcoco / "refs(unc).p").unlink()
    (refcoco / "refs.p").write_bytes(content)
    with pytest.raises(DataError, match=message):
        run("refcoco", refcoco)
    assert not Path("/tmp/sphinxkit-must-not-exist").exists()


IMAGE_DATA = [
    {
        "width": 200,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
        "height": 100,
        "image_id": 1,
        "coco_id": None,
        "flickr_id": None,
    }
]


def genome(tmp_path: Path, name: str, content: Any) -> Path:
    (tmp_path / "image_data.json").write_text(json.dumps(IMAGE_DATA))
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_visual_genome_regions(tmp_path: Path) -> None:
    region = {
        "region_id": 1382,
        "width": 100,
        "height": 50,
        "image_id": 1,
        "phrase": "the clock is green ",
        "x": 20,
        "y": 10,
    }
    content = [
        {"id": 1, "regions": [region, {**region, "width": -1}, {**region, "x": None}]},
        {"id": 2, "regions": [region]},
        {"id": 1},
    ]
    path = genome(tmp_path, "region_descriptions.json", content)
    records, problems = run("visual_genome", path, "reg")
    assert [record["image"] for record in records] == ["VG_100K_2/1.jpg"]
    assert turns(records[0])[1] == "the clock is green"
    assert [problem.reason for problem in problems.listed] == [
        "regions of image 1: region_id 1382: the box has no area: [20.0, 10.0, -1.0, 50.0]",
        "regions of image 1: region_id 1382: 'x' must be a finite number, got None",
        "id 2: the image is not in image_data.json",
        "id 1: 'regions' must be a list, got None",
    ]
    elsewhere = tmp_path / "other" / "r.json"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    records, _ = run("visual_genome", elsewhere, "rec", companion=tmp_path / "image_data.json")
    assert turns(records[0])[1] == "[0.100,0.300,0.600,0.550]"


def test_visual_genome_relationships(tmp_path: Path) -> None:
    subject = {"name": "shade", "h": 50, "w": 100, "x": 20, "y": 10, "object_id": 1, "synsets": ["shade.n.01"]}
    target = {"names": ["street"], "h": 60, "w": 40, "x": 140, "y": 10, "object_id": 2}
    relation = {"predicate": "ON", "object": target, "relationship_id": 15927, "synsets": [], "subject": subject}
    content = [{"relationships": [relation, {**relation, "subject": None}], "image_id": 1}]
    records, problems = run("visual_genome", genome(tmp_path, "relationships.json", content), "relation")
    assert turns(records[0]) == (
        "Please provide the bounding box coordinate of the region this sentence describes : shade on street.",
        "<p>shade</p>[0.100,0.300,0.600,0.550] <p>street</p>[0.700,0.300,0.900,0.600]",
    )
    assert records[0]["id"] == "15927"
    assert [problem.reason for problem in problems.listed] == [
        "relationships of image 1: relationship_id 15927: expected an object, got NoneType"
    ]


def test_visual_genome_questions(tmp_path: Path) -> None:
    asked = {"a_objects": [], "q_objects": [], "image_id": 1, "qa_id": 986768, "answer": "Green."}
    question = "What color is the clock?"
    content = [{"id": 1, "qas": [{**asked, "question": question}, asked]}]
    records, problems = run("visual_genome", genome(tmp_path, "question_answers.json", content), "vqa")
    assert [(record["id"], record["image"], *turns(record)) for record in records] == [
        ("986768", "VG_100K_2/1.jpg", f"{question}\nAnswer the question using a single word or phrase.", "Green.")
    ]
    assert [problem.reason for problem in problems.listed] == [
        "qas of image 1: qa_id 986768: 'question' must be a text that is not empty, got None"
    ]


def test_bad_image_data(tmp_path: Path) -> None:
    path = genome(tmp_path, "region_descriptions.json", [])
    (tmp_path / "image_data.json").write_text('[{"image_id": 1, "width": 3}]')
    _, problems = run("visual_genome", path)
    assert [problem.reason for problem in problems.listed] == ["image_id 1: 'height' must be a finite number, got None"]


def xml(objects: str, size: str = "<width>200</width><height>100</height><depth>3</depth>") -> str:
    return f"<annotation><filename>36979.jpg</filename><size>{size}</size>{objects}</annotation>"


def entity(names: list[str], *boxes: tuple[int, int, int, int]) -> str:
    listed = "".join(f"<name>{name}</name>" for name in names)
    bounds = "".join(
        f"<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>" for a, b, c, d in boxes
    )
    return f"<object>{listed}{bounds or '<nobndbox>1</nobndbox>'}</object>"


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    for name in ("Sentences", "Annotations"):
        (tmp_path / name).mkdir()
    sentences = (
        "[/EN#1/people A group of friends] in [/EN#2/scene a yard] hold [/EN#3/other red things] .\n"
        "Nothing here is marked .\n"
        " \n"
    )
    (tmp_path / "Sentences" / "36979.txt").write_text(sentences)
    # corners count from 1 and both belong to the box: 21..120 is x 20 to 120
    objects = entity(["1", "3"], (21, 11, 120, 60)) + entity(["1"], (141, 11, 180, 70)) + entity(["2"])
    (tmp_path / "Annotations" / "36979.xml").write_text(xml(objects))
    return tmp_path


def test_flickr30k_entities(flickr: Path) -> None:
    records, problems = run("flickr30k", flickr)
    assert [(record["id"], record["image"]) for record in records] == [
        ("36979:1", "36979.jpg"),
        ("36979:2", "36979.jpg"),
    ]
    assert turns(records[0]) == (
        "Describe the image concisely. Include the bounding box for each mentioned object.",
        "<p>A group of friends</p>[0.100,0.300,0.600,0.550;0.700,0.300,0.900,0.600] in a yard hold "
        "<p>red things</p>[0.100,0.300,0.600,0.550] .",
    )
    assert turns(records[1])[1] == "Nothing here is marked ."
    assert [(problem.line, problem.reason) for problem in problems.listed] == [(3, "the sentence is empty")]


def test_flickr30k_splits(flickr: Path) -> None:
    (flickr / "train.txt").write_text("36979\n")
    (flickr / "val.txt").write_text("5\n")
    assert len(run("flickr30k", flickr, split="train")[0]) == 2
    assert run("flickr30k", flickr, split="val")[0] == []
    with pytest.raises(DataError, match=r"test\.txt: cannot be read"):
        run("flickr30k", flickr, split="test")
    with pytest.raises(DataError, match="expected the folders Sentences and Annotations"):
        run("flickr30k", flickr / "Sentences")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "36979.xml cannot be read"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "36979.xml has a DOCTYPE, which is not allowed"),
        ("<annotation>", "36979.xml: no element found"),
        ("<annotation/>", "36979.xml: invalid literal for int"),
        (xml("", "<width>0</width><height>1</height>"), "36979.xml: image geometry: sides must be positive"),
    ],
)
def test_bad_flickr30k_annotations(flickr: Path, content: str | None, reason: str) -> None:
    path = flickr / "Annotations" / "36979.xml"
    path.unlink()
    if content is not None:
        path.write_text(content)
    records, problems = run("flickr30k", flickr)
    assert records == []
    assert reason in problems.listed[0].reason
    assert problems.listed[0].file.endswith("36979.txt")


def test_one_bad_box_costs_that_one(flickr: Path) -> None:
    broken = entity(["3"], (21, 11, 120, 60)).replace("<ymin>11</ymin>", "<ymin>x</ymin>")
    objects = entity(["1"], (21, 11, 120, 60), (300, 1, 310, 5)) + broken
    (flickr / "Annotations" / "36979.xml").write_text(xml(objects))
    records, problems = run("flickr30k", flickr)
    assert turns(records[0])[1] == ("<p>A group of friends</p>[0.100,0.300,0.600,0.550] in a yard hold red things .")
    reasons = [problem.reason for problem in problems.listed]
    assert reasons[0] == "entity 1: the box [299, 0, 11, 5] lies outside the image of 200x100"
    assert reasons[1].startswith("entity 3: invalid literal for int")
    assert problems.listed[0].file.endswith("36979.xml")


def test_flickr30k_files_in_another_encoding(flickr: Path) -> None:
    (flickr / "Sentences" / "1.txt").write_bytes(b"A caf\xe9 .\nA bar .\n")
    (flickr / "Sentences" / "2.txt").write_bytes(b"A dog .\n")
    (flickr / "Annotations" / "1.xml").write_text(xml(""))
    (flickr / "Annotations" / "2.xml").write_bytes(xml("").replace("36979", "\xe9").encode("latin1"))
    records, problems = run("flickr30k", flickr, split=None)
    assert [record["id"] for record in records] == ["1:2", "36979:1", "36979:2"]
    assert [(Path(problem.file).name, problem.line, problem.reason) for problem in problems.listed[:2]] == [
        ("1.txt", 1, "not UTF-8: invalid continuation byte at byte 5 of the line"),
        ("2.txt", 1, "2.xml is not UTF-8: invalid continuation byte at byte 22"),
    ]


def test_read_entities() -> None:
    text, spans = read_entities("A [/EN#12/people/clothing man in red] and [/EN#0/notvisual it] .")
    assert text == "A man in red and it ."
    assert [(text[start:end], name) for start, end, name in spans] == [("man in red", "12"), ("it", "0")]
