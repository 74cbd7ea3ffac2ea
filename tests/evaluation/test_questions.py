from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, read_annotations
from sphinxkit.evaluation.annotation import Annotation
from sphinxkit.evaluation.questions import check_images, fill_in, hash_prompts, make_questions
from sphinxkit.formatters import sphinx_v1, tasks

OPEN = "\n\n### Human: "
CLOSE = "\n### Assistant:"


def annotation(question: str = "dog", image: str = "a.png", **fields: Any) -> Annotation:
    return Annotation(7, image, question, "x", "a.json:1", (200, 100), fields)


def prompt(name: str, *given: Annotation, **options: Any) -> str:
    [question] = make_questions(benchmarks.get(name), given or [annotation()], "images", sphinx_v1(), **options)
    return question.prompt.split(OPEN)[1]


# Written by hand from the public implementation's accessory/eval_mm/annotations/annotation_config.json.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MME_benchmark", "dog\nAnswer the question using a single word or phrase." + CLOSE),
        (
            "vizwiz_val",
            "dog When the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase." + CLOSE,
        ),
        ("vsr_val", "dog" + CLOSE),
        ("Qbench_dev", "dog" + CLOSE),
        ("scienceqa_test_img", "dog" + CLOSE + " The answer is"),
        (
            "refcoco+_testA",
            "Please provide the bounding box coordinate of the region this sentence describes: dog." + CLOSE,
        ),
        ("coco_detection_val", "Detect all dog shown in the image." + CLOSE),
        ("coco_caption_val", "Provide a one-sentence caption for the provided image." + CLOSE),
    ],
)
def test_prompts(name: str, expected: str) -> None:
    assert prompt(name) == expected


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_can_be_asked(name: str) -> None:
    text = prompt(name, annotation(box=[20, 10, 120, 60]))
    # 200 x 100 pixels in a square of 200: y moves down by 50
    assert ("[0.100,0.300,0.600,0.550]" in text) == (name in ("reg", "pose"))


def test_fields_go_before_the_question() -> None:
    assert "Detect all cat shown" in prompt("detection", annotation(category="cat"))
    choices = annotation("Which?", choices=["one", "two"], context="Read this.")
    assert "Context:\nRead this.\nQuestion:\nWhich?\nChoices:\nA. one\nB. two" in prompt("multiple_choice", choices)
    assert "Page-footer" in prompt("doclaynet_val")
    assert "Page-footer" not in prompt("publaynet_val")


def test_a_foreign_task_is_filled_in_by_its_argument_names() -> None:
    class Foreign(tasks.VQA):
        def prompt(self, topic: str, colour: str = "red", wording: int = 0) -> str:
            return f"{topic} {colour} {wording}"

    assert fill_in(Foreign(), annotation("dog")) == "dog red 0"
    assert fill_in(Foreign(), annotation("dog", colour="blue")) == "dog blue 0"


def test_questions_of_a_golden_file(golden: Path) -> None:
    annotations = read_annotations(golden / "scoring" / "chartqa_test_augmented.annotations.json")
    questions = make_questions(
        benchmarks.get("chartqa_test_augmented"), annotations, "/root/of", sphinx_v1(), "data/chartqa/"
    )
    assert {question.question_id for question in questions} == {-1}
    assert len({question.key for question in questions}) == len(annotations)
    assert questions[3].key == "3:-1"
    assert questions[0].image == Path("/root/of/ChartQA Dataset/test/png/multi_col_803.png")
    assert hash_prompts(questions) != hash_prompts(questions[:-1])


def test_an_annotation_without_image_is_asked_without_one() -> None:
    [question] = make_questions(benchmarks.get("vsr_val"), [annotation(image="")], "images", sphinx_v1())
    assert question.image is None


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("vsr_val", annotation(" "), r"^a\.json:1: conversation: message 0 \(user\) is empty"),
        ("vqa", annotation(" "), r"^a\.json:1: task 'vqa': the question is empty"),
        ("pose", annotation(), r"^a\.json:1: expected 4 finite numbers, got None, as the 'box' that task 'pose' asks"),
        ("reg", annotation(box=[300, 300, 500, 500]), r"^a\.json:1: task 'reg': .*image"),
        ("reg", dataclasses.replace(annotation(box=[1, 1, 5, 5]), size=None), r"^a\.json:1: the image size is needed"),
        ("multiple_choice", annotation(choices="AB"), r"^a\.json:1: 'choices' must be a list of texts, got 'AB'"),
        ("detection", annotation(category=3), r"^a\.json:1: 'category' must be text, got 3"),
    ],
)
def test_faults(name: str, given: Annotation, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompt(name, given)


def test_paths() -> None:
    with pytest.raises(DataError, match=r"a\.json:1: image_path 'a\.png' does not begin with 'data/'"):
        prompt("vqa", strip_prefix="data/")
    for name in ("../../../../etc/passwd", "/etc/passwd", "a/../../b.png"):
        with pytest.raises(DataError, match=rf"a\.json:1: image '{name}' is not below the folder of images, photos"):
            make_questions(benchmarks.get("vqa"), [annotation(image=name)], "photos", sphinx_v1())
    questions = make_questions(benchmarks.get("vqa"), [annotation()] * 2, "nowhere", sphinx_v1())
    with pytest.raises(DataError, match=r"nowhere holds none of the 2 images; the first would be nowhere/a\.png"):
        check_images(questions, "nowhere")
    check_images([], "nowhere")


def test_half_a_surrogate_pair_can_be_hashed(tmp_path: Path) -> None:
    record = {"image_path": "", "question": "\ud83d", "question_id": 0, "gt_answers": "x"}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    annotations: Sequence[Annotation] = read_annotations(tmp_path / "a.json")
    assert len(hash_prompts(make_questions(benchmarks.get("vsr_val"), annotations, "", sphinx_v1()))) == 64
