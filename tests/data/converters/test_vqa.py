from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.converters import Problems, Source, convert_records
from sphinxkit.errors import DataError

SHORT = "\nAnswer the question using a single word or phrase."


def run(
    name: str, path: Path, *, task: str | None = None, **source: Any
) -> tuple[list[tuple[str, str, str, str]], Problems]:
    problems = Problems()
    records = []
    for record in convert_records(Source(path, **source), name, task, problems, wording=0):
        question, answer = (turn["value"] for turn in record["conversations"])
        records.append((record["id"], record["image"], question.removeprefix("<image>\n"), answer))
    return records, problems


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=1))
    return path


QUESTIONS = {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"url": "x"},
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 9, "question": "Is it?", "question_id": 9001},
        {"image_id": 9, "question": "Nobody answered?", "question_id": 9002},
    ],
}


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": index} for index, text in enumerate(texts, 1)]


ANNOTATIONS = {
    "info": {},
    "annotations": [
        {
            "question_type": "what",
            "multiple_choice_answer": "net",
            "answers": answers("net", "netting"),
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
        },
        {"answers": answers("no", "yes", "yes"), "image_id": 9, "question_id": 9001},
    ],
}
VQA_WANTED = [
    ("458752000", "COCO_train2014_000000458752.jpg", "What is this photo taken looking through?" + SHORT, "net"),
    ("9001", "COCO_train2014_000000000009.jpg", "Is it?" + SHORT, "yes"),
]


def test_vqav2_from_two_files_or_their_folder(tmp_path: Path) -> None:
    questions = write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    annotations = write(tmp_path / "v2_mscoco_train2014_annotations.json", ANNOTATIONS)
    for path, companion in ((questions, annotations), (tmp_path, None)):
        records, problems = run("vqav2", path, companion=companion)
        assert problems.count == 0
        assert records == VQA_WANTED


def test_vqav2_faults(tmp_path: Path) -> None:
    questions = write(
        tmp_path / "a_questions.json", {**QUESTIONS, "questions": [*QUESTIONS["questions"], {"image_id": 1}]}
    )
    bad = [{"question_id": 1, "answers": answers("x")}, {"question_id": 9001, "answers": []}, {"question_id": 9002}]
    annotations = write(tmp_path / "a_annotations.json", {"annotations": bad})
    records, problems = run("vqav2", tmp_path)
    assert records == []
    assert [(Path(problem.file), problem.reason) for problem in problems.listed] == [
        (questions, "questions: 'question' must be a text that is not empty, got None"),
        (annotations, "annotations: question_id 1: it is not among the questions"),
        (annotations, "annotations: question_id 9001: 'answers' is empty"),
        (annotations, "annotations: question_id 9002: 'answers' must be a list, got None"),
    ]
    with pytest.raises(DataError, match=r"VQAv2's annotations file .* is needed as well: give it as the companion"):
        run("vqav2", questions)
    write(tmp_path / "b_questions.json", QUESTIONS)
    with pytest.raises(DataError, match=r"expected one \*questions\.json, found 2"):
        run("vqav2", tmp_path)


def test_vqav2_image_ids_are_numbers(tmp_path: Path) -> None:
    asked = {"image_id": "COCO_1.jpg", "question": "Why?", "question_id": 1}
    write(tmp_path / "a_questions.json", {"data_subtype": "val2014", "questions": [asked]})
    write(tmp_path / "a_annotations.json", {"annotations": [{"question_id": 1, "answers": answers("x")}]})
    records, problems = run("vqav2", tmp_path)
    assert records == []
    assert problems.listed[0].reason == "annotations: question_id 1: image_id 'COCO_1.jpg' is not one of COCO's"


def test_gqa(tmp_path: Path) -> None:
    content = {
        "02930152": {
            "semantic": [],
            "entailed": [],
            "question": "Is the sky dark?",
            "imageId": "2354786",
            "isBalanced": True,
            "answer": "yes",
            "fullAnswer": "Yes, the sky is dark.",
        },
        "07333408": {"question": "What is on the wall?", "imageId": "2375429", "answer": ""},
    }
    records, problems = run("gqa", write(tmp_path / "val_balanced_questions.json", content))
    assert records == [("02930152", "2354786.jpg", "Is the sky dark?" + SHORT, "yes")]
    assert [(problem.line, problem.reason) for problem in problems.listed] == [
        (11, "question 07333408: 'answer' must be a text that is not empty, got ''")
    ]


def test_ocrvqa(tmp_path: Path) -> None:
    content = {
        "1421598896": {
            "imageURL": "http://e.com/I/51.gif",
            "questions": ["Who wrote this?", "Year?"],
            "answers": ["Sandra", 2016],
            "title": "Mom",
            "authorName": "Sandra",
            "genre": "Calendars",
            "split": 1,
        },
        "B00": {"imageURL": "http://e.com/I/52", "questions": ["Genre?", "x"], "answers": ["Law", " "], "split": 3},
        "B01": {"imageURL": "http://e.com/I/53.jpg", "questions": ["Genre?"], "answers": [], "split": 1},
    }
    path = write(tmp_path / "dataset.json", content)
    records, problems = run("ocrvqa", path)
    assert records == [
        ("1421598896:0", "1421598896.gif", "Who wrote this?" + SHORT, "Sandra"),
        ("1421598896:1", "1421598896.gif", "Year?" + SHORT, "2016"),
        ("B00:0", "B00.jpg", "Genre?" + SHORT, "Law"),
    ]
    assert [problem.reason for problem in problems.listed] == [
        "image B00: question 1: 'answer' must be a text that is not empty, got ' '",
        "image B01: 1 questions but 0 answers",
    ]
    assert [record[0] for record in run("ocrvqa", path, split="test")[0]] == ["B00:0"]


def test_textcaps(tmp_path: Path) -> None:
    content = {
        "dataset_type": "train",
        "dataset_name": "textcaps",
        "data": [
            {
                "image_id": "0054c91397f2fe05",
                "caption_str": "a red can",
                "caption_id": 1,
                "image_name": "0054c91397f2fe05",
                "image_width": 1024,
                "reference_strs": ["a red can", "a can"],
            },
            {"image_id": "11", "reference_strs": ["one", "two"]},
            {"image_id": "12", "caption_str": ""},
        ],
    }
    records, problems = run("textcaps", write(tmp_path / "TextCaps_0.1_train.json", content))
    assert [(name, image, answer) for name, image, _, answer in records] == [
        ("1", "0054c91397f2fe05.jpg", "a red can"),
        ("11:0", "11.jpg", "one"),
        ("11:1", "11.jpg", "two"),
    ]
    (problem,) = problems.listed
    assert problem.reason.startswith("image_id 12: 'caption_str' must be a text")


TEXTVQA = {
    "dataset_type": "train",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand of phone?",
            "image_id": "0054c91397f2fe05",
            "image_classes": ["Belt", "Headphones"],
            "flickr_original_url": "https://farm5.staticflickr.com/2807/9508110258_x_o.jpg",
            "flickr_300k_url": "https://c4.staticflickr.com/3/2807/9508110258_x_z.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": ["nokia", "nok", "nokia", "nokia", "toshiba", "nokia", "nokia", "nokia", "nokia", "nokia"],
            "question_tokens": ["what", "is", "the", "brand", "of", "phone"],
            "question_id": 0,
            "set_name": "train",
        },
        {"question": "what?", "image_id": "2", "answers": ["4", "5", "5"], "question_id": 1, "set_name": "train"},
        {"question": "what?", "image_id": "2", "question_id": 34602, "set_name": "test"},
    ],
}
ROSETTA = {
    "dataset_type": "train",
    "dataset_version": "0.2",
    "data": [{"image_id": "0054c91397f2fe05", "ocr_tokens": ["MIA", "NOKIA"], "ocr_info": [{"word": "MIA"}]}],
}


def test_textvqa_with_and_without_ocr_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "TextVQA_0.5.1_train.json", TEXTVQA)
    records, problems = run("textvqa", path)
    assert records == [
        ("0", "0054c91397f2fe05.jpg", "what is the brand of phone?" + SHORT, "nokia"),
        ("1", "2.jpg", "what?" + SHORT, "5"),
    ]
    assert [problem.reason for problem in problems.listed] == ["question_id 34602: 'answers' must be a list, got None"]
    ocr = write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_train.json", ROSETTA)
    records, _ = run("textvqa", path, companion=ocr)
    assert [question for _, _, question, _ in records] == [
        "what is the brand of phone?\nReference OCR token: MIA, NOKIA" + SHORT,
        "what?" + SHORT,  # nothing was read in this image
    ]


def test_vqav2_questions_with_one_id(tmp_path: Path) -> None:
    """Two files were joined: whose answer it is cannot be known."""
    asked = [{"image_id": n, "question": f"Why {n}?", "question_id": 7} for n in (1, 2)]
    write(tmp_path / "a_questions.json", {"data_subtype": "val2014", "questions": asked})
    write(tmp_path / "a_annotations.json", {"annotations": [{"question_id": 7, "answers": answers("x")}]})
    records, problems = run("vqav2", tmp_path)
    assert records == []
    assert [problem.reason for problem in problems.listed] == [
        "questions: id 7 is there 2 times, with different content; what refers to it is left out",
        "annotations: question_id 7: id 7 is there more than once among the questions, with different content",
    ]
