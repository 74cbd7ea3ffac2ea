from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphinxkit.data.converters import Problems, Source, convert_records

SHORT = "\nAnswer the question using a single word or phrase."


def run(name: str, path: Path, content: Any) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    path.write_text(json.dumps(content, indent=1))
    problems = Problems()
    records = [
        (record["id"], record["image"], *(turn["value"].removeprefix("<image>\n") for turn in record["conversations"]))
        for record in convert_records(Source(path), name, None, problems, wording=0)
    ]
    return records, [problem.reason for problem in problems.listed]


def test_docvqa(tmp_path: Path) -> None:
    asked = {
        "questionId": 337,
        "question": "what is the date mentioned in this letter?",
        "question_types": ["handwritten", "form"],
        "image": "documents/xnbl0037_1.png",
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93", "1/8/1993"],
        "data_split": "train",
    }
    content = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "train"}
    records, problems = run(
        "docvqa", tmp_path / "train_v1.0_withQT.json", {**content, "data": [asked, {**asked, "answers": []}]}
    )
    assert records == [("337", "documents/xnbl0037_1.png", asked["question"] + SHORT, "1/8/93")]
    assert problems == ["questionId 337: 'answers' is empty"]


def test_infographicvqa(tmp_path: Path) -> None:
    asked = {
        "questionId": 65718,
        "question": "Which social platform has heavy female audience?",
        "image_local_name": "37313.jpeg",
        "image_url": "https://blogs.constantcontact.com/x.jpg",
        "ocr_output_file": "37313.json",
        "answers": ["pinterest"],
        "data_split": "train",
    }
    content = {"dataset_name": "infographicVQA", "dataset_version": "train_v1.0", "dataset_split": "train"}
    path = tmp_path / "infographicsVQA_train_v1.0.json"
    records, problems = run("InfographicVQA", path, {**content, "data": [asked]})
    assert problems == []
    assert records == [("65718", "37313.jpeg", asked["question"] + SHORT, "pinterest")]


def test_chartqa(tmp_path: Path) -> None:
    asked = {"imgname": "41699051005347.png", "query": "How many food item is shown in the bar graph?", "label": "14"}
    again = {**asked, "query": "Is it?", "label": "Yes"}
    records, problems = run("chartqa", tmp_path / "train_human.json", [asked, again, {"imgname": "a.png"}])
    assert records == [
        ("41699051005347.png:0", "41699051005347.png", asked["query"] + SHORT, "14"),
        ("41699051005347.png:1", "41699051005347.png", "Is it?" + SHORT, "Yes"),
    ]
    assert problems == ["imgname a.png: 'query' must be a text that is not empty, got None"]
