from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sphinxkit
from sphinxkit.errors import DataError, SphinxkitError
from sphinxkit.evaluation.annotation import Annotation
from sphinxkit.evaluation.inputs import manifest_path, read_annotations, read_predictions

UNIQUE = [
    {"question_id": 7, "question": "q", "image_path": "a.jpg", "gt_answers": "x"},
    {"question_id": 8, "question": "r", "image_path": "b.jpg", "gt_answers": ["y"]},
]


def _write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    return path


@pytest.fixture
def annotations(tmp_path: Path) -> list[Annotation]:
    return read_annotations(_write(tmp_path / "a.json", UNIQUE))


def test_annotations_know_their_place(annotations: list[Annotation], tmp_path: Path) -> None:
    assert [annotation.where for annotation in annotations] == [f"{tmp_path}/a.json:2", f"{tmp_path}/a.json:8"]
    assert [annotation.question_id for annotation in annotations] == [7, 8]
    assert annotations[1].gold == ["y"]


def test_annotations_as_json_lines_and_in_the_vqa_challenges_form(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record) for record in UNIQUE)
    assert [a.gold for a in read_annotations(_write(tmp_path / "a.jsonl", lines))] == ["x", ["y"]]
    official = {"info": {}, "annotations": [{"question_id": 1, "answers": [{"answer": "a"}] * 10}]}
    assert len(read_annotations(_write(tmp_path / "v.json", official))[0].gold) == 10


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"question_id": "height480_width640"}, (640, 480)),
        ({"question_id": 1, "width": 30, "height": 20}, (30, 20)),
        ({"question_id": 1}, None),
    ],
)
def test_image_size(tmp_path: Path, record: dict[str, Any], wanted: tuple[int, int] | None) -> None:
    (annotation,) = read_annotations(_write(tmp_path / "a.json", [{**record, "gt_answers": "x"}]))
    assert annotation.size == wanted
    if wanted is None:
        with pytest.raises(DataError, match=r"a\.json:2: the image size is needed: 'width' and 'height'"):
            _ = annotation.geometry
    else:
        assert (annotation.geometry.width, annotation.geometry.height) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"a\.json: no annotations"),
        ("[3]", r"a\.json:1: an annotation must be an object, got int"),
        ('[\n{"question_id": 1}]', r"a\.json:2: the annotation has no 'gt_answers'; its keys: question_id"),
        (
            '[{"question_id": [1], "gt_answers": "x"}]',
            r"a\.json:1: question_id must be a string or an integer, got \[1\]",
        ),
        ('{"data": []}', r"a\.json: no annotations"),
        ('{"x": []}', r"a\.json: expected a list of annotations, or an object with 'annotations'"),
        ('[{"gt_answers": "x"}', r"a\.json:1: expected ',' or ']' after a record, found ''"),
        ('[{"gt_answers": x}]', r"a\.json:1: not JSON"),
    ],
)
def test_bad_annotations(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_annotations(_write(tmp_path / "a.json", content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        read_annotations(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        ["one", "two"],
        {"benchmark": "b", "predictions": ["one", "two"], "manifest": {"seed": 1}},
        [{"question_id": 8, "answer": "two"}, {"question_id": 7, "answer": "one"}],
        {"predictions": [{"question_id": "8", "answer": "two"}, {"question_id": "7", "answer": "one"}]},
        '{"question_id": 8, "answer": "two"}\n\n{"question_id": 7, "answer": "one", "extra": 1}\n',
    ],
)
def test_three_forms_of_predictions(tmp_path: Path, annotations: list[Annotation], content: Any) -> None:
    for name in ("p.json", "p.txt"):
        predictions = read_predictions(_write(tmp_path / name, content), annotations)
        assert predictions.answers == ["one", "two"]
    assert predictions.manifest == ({"seed": 1} if isinstance(content, dict) and "manifest" in content else {})


def test_a_single_line_is_a_prediction_too(tmp_path: Path, annotations: list[Annotation]) -> None:
    content = '{"question_id": 7, "answer": "one"}\n'
    assert read_predictions(_write(tmp_path / "p.json", content), annotations[:1]).answers == ["one"]
    assert read_predictions(_write(tmp_path / "p.jsonl", content), annotations[:1]).answers == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["one"], r"p\.json: 1 predictions for 2 annotations"),
        (["one", "two", "three"], r"p\.json: 3 predictions for 2 annotations"),
        ([], r"p\.json: 0 predictions for 2 annotations"),
        (["one", [3]], r"p\.json:3: a prediction must be a string or an object, got list"),
        (["one", {"question_id": 8, "answer": "x"}], r"p\.json: 1 predictions are strings and 1 are objects"),
        ({"predictions": "one"}, r"p\.json: 'predictions' must be a list, got str"),
        ({"answers": []}, r"p\.json: expected a list of strings, an object with 'predictions', an object"),
        (
            '{"question_id": 7, "answer": "a"}\n{"question_id": 7, "answer": "b"}',
            r"p\.json:2: question_id '7' is there twice, first on line 1",
        ),
        (
            '{"question_id": 7, "answer": "a"}\n{"question_id": 9, "answer": "b"}',
            r"p\.json:2: question_id '9' is not in the annotations",
        ),
        ('{"question_id": 7, "answer": "a"}\n{"question_id": 8}', r"p\.json:2: the prediction has no 'answer'"),
        (
            '{"question_id": 7, "answer": "a"}\n{"question_id": 8, "answer": [1]}',
            r"p\.json:2: answer must be a string, got list",
        ),
        (
            [{"question_id": 8, "answer": "x"}],
            r"no prediction for 1 of 2 questions, the first is question_id 7 \(.*a\.json:2\)",
        ),
        ('["one",\n"two"', r"p\.json:2: expected ',' or ']'"),
    ],
)
def test_bad_predictions(tmp_path: Path, annotations: list[Annotation], content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_predictions(_write(tmp_path / "p.json", content), annotations)


def test_a_bad_line_of_json_lines(tmp_path: Path, annotations: list[Annotation]) -> None:
    path = _write(tmp_path / "p.jsonl", '{"question_id": 7, "answer": "a"}\n{"question_id":\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not JSON"):
        read_predictions(path, annotations)


def test_ids_that_repeat_need_the_annotations_order(tmp_path: Path) -> None:
    repeated = [{"question_id": key, "gt_answers": "x"} for key in ("a", "b", "a")]
    annotations = read_annotations(_write(tmp_path / "a.json", repeated))
    lines = [{"question_id": key, "answer": str(index)} for index, key in enumerate(("a", "b", "a"))]
    assert read_predictions(_write(tmp_path / "p.json", lines), annotations).answers == ["0", "1", "2"]
    with pytest.raises(
        DataError, match=r"question_id 'a' where the annotations have 'b'; the benchmark's ids are not unique"
    ):
        read_predictions(_write(tmp_path / "p.json", [lines[0], lines[2], lines[1]]), annotations)
    with pytest.raises(DataError, match="2 predictions for 3 annotations"):
        read_predictions(_write(tmp_path / "p.json", lines[:2]), annotations)


def test_json_lines_have_their_manifest_beside_them(tmp_path: Path, annotations: list[Annotation]) -> None:
    path = _write(tmp_path / "p.jsonl", '{"question_id": 7, "answer": "a"}\n{"question_id": 8, "answer": "b"}\n')
    assert read_predictions(path, annotations).manifest == {}
    _write(manifest_path(path), {"template": "sphinx_v1"})
    assert manifest_path(path) == tmp_path / "p.jsonl.manifest.json"
    assert read_predictions(path, annotations).manifest == {"template": "sphinx_v1"}


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (10**400, 5)])
def test_a_size_that_no_image_has(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"^a\.json:3: width and height must be positive, got \("):
        _ = Annotation(1, "", "", "x", "a.json:3", size, {}).geometry


@pytest.mark.parametrize("key", ["question_id", "image_path", "gt_answers"])
@pytest.mark.parametrize(
    "value", ["x" * 200_000, ["y" * 200] * 1000, {str(number): number for number in range(20_000)}]
)
@pytest.mark.parametrize("benchmark", ["MME_benchmark", "vsr_val"])
def test_messages_show_the_beginning_of_a_long_value(tmp_path: Path, key: str, value: object, benchmark: str) -> None:
    asked = {"question_id": "1", "image_path": "color/a.jpg", "question": "q", "gt_answers": "yes"}
    (tmp_path / "a.json").write_text(json.dumps([asked | {key: value}, asked | {"question_id": "2"}]))
    (tmp_path / "p.json").write_text(json.dumps([{"question_id": str(number), "answer": "yes"} for number in (1, 2)]))
    said = ""
    try:
        sphinxkit.score(benchmark, tmp_path / "a.json", tmp_path / "p.json")
    except SphinxkitError as error:
        said = str(error)
    assert len(said) < 2000
