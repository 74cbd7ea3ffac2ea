from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphinxkit.data.converters import Problems, Source, convert_records

LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."

STATES = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map: cardinal directions",
    "lecture": "Maps have four cardinal directions.",
    "solution": "To find the answer, look at the compass rose.",
    "split": "train",
}
TEXT = {**STATES, "choices": ["yes", "no"], "answer": 1, "hint": "It rains.", "image": None, "split": "test"}

AOKVQA = {
    "split": "train",
    "image_id": 299207,
    "question_id": "22MexNkBPpdZGX6sxbxVBH",
    "question": "What is the man by the bags awaiting?",
    "choices": ["skateboarder", "train", "delivery", "cab"],
    "correct_choice_idx": 3,
    "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"],
    "difficult_direct_answer": False,
    "rationales": ["A train would not be on the street."],
}


def run(name: str, path: Path, content: Any, task: str | None = None, **source: Any) -> tuple[list[Any], list[str]]:
    path.write_text(json.dumps(content))
    problems = Problems()
    records = [
        (record["id"], record.get("image"), *(turn["value"] for turn in record["conversations"]))
        for record in convert_records(Source(path, **source), name, task, problems, wording=0)
    ]
    return records, [problem.reason for problem in problems.listed]


def test_scienceqa(tmp_path: Path) -> None:
    bad = {**STATES, "answer": 4}
    content = {"1": STATES, "5": TEXT, "6": bad, "7": {**STATES, "answer": None}}
    records, problems = run("ScienceQA", tmp_path / "problems.json", content)
    question = "Question:\nWhich of these states is farthest north?\nChoices:\n"
    assert records == [
        (
            "1",
            "train/1/image.png",
            f"<image>\n{question}A. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma{LETTER}",
            "A",
        ),
        ("5", None, f"Context:\nIt rains.\n{question}A. yes\nB. no{LETTER}", "B"),
    ]
    assert problems == [
        "6: task 'multiple_choice': answer 4 is none of 4 choices",
        "7: 'answer' must be the index of a choice, got None",
    ]
    assert [record[0] for record in run("scienceqa", tmp_path / "p.json", content, split="test")[0]] == ["5"]


def test_aokvqa(tmp_path: Path) -> None:
    path, image = tmp_path / "aokvqa_v1p0_train.json", "train2017/000000299207.jpg"
    content = [AOKVQA, {**AOKVQA, "image_id": "x"}, {**AOKVQA, "direct_answers": [], "choices": []}]
    records, problems = run("A-OKVQA", path, content)
    (record,) = records
    assert (record[0], record[1], record[3]) == ("22MexNkBPpdZGX6sxbxVBH", image, "D")
    assert record[2].endswith(f"\nA. skateboarder\nB. train\nC. delivery\nD. cab{LETTER}")
    name = "question_id 22MexNkBPpdZGX6sxbxVBH: "
    assert problems == [f"{name}'image_id' must be one of COCO's, got 'x'", f"{name}'choices' is empty"]
    records, problems = run("aokvqa", path, content, "vqa")
    # "ride", "taxi" and "cab" were said twice: the first counts
    assert records == [("22MexNkBPpdZGX6sxbxVBH", image, f"<image>\n{AOKVQA['question']}{SHORT}", "ride")]
    assert problems[1] == f"{name}'direct_answers' is empty"
