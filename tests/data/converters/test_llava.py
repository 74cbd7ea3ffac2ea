from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.converters import Problems, Source, convert_records


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=1))
    return path


def test_llava_in_both_forms(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A bus."}]
    content: list[Any] = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": turns},
        {"id": "text", "conversations": [{"from": "human", "value": "What?"}, turns[1]]},
        {"id": "bad", "conversations": turns[:1]},
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": turns},
        3,
    ]
    for path in (write(tmp_path / "a.json", content), tmp_path / "a.jsonl"):
        if path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, content)))
        problems = Problems()
        records = list(convert_records(Source(path), "llava", "detailed_caption", problems))
        assert records == [
            {
                "id": "000000033471",
                "image": "coco/train2017/000000033471.jpg",
                "task": "detailed_caption",
                "conversations": turns,
            },
            {"id": "text", "task": "detailed_caption", "conversations": content[1]["conversations"]},
        ]
        assert [problem.reason for problem in problems.listed] == [
            "id bad: no question of 'conversations' has an answer",
            "id two: 'image' names 2 images; a sample has one at most",
            "expected an object, got int",
        ]


HUMAN, GPT = ({"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."})
EMPTY = {"from": "gpt", "value": " "}


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([GPT, HUMAN, GPT], [HUMAN, GPT]),
        ([HUMAN, GPT, HUMAN], [HUMAN, GPT]),
        ([GPT, GPT, HUMAN, GPT, HUMAN, GPT, HUMAN, EMPTY], [HUMAN, GPT, HUMAN, GPT]),
        (
            [{"from": "system", "value": "Be kind."}, GPT, HUMAN, GPT],
            [{"from": "system", "value": "Be kind."}, HUMAN, GPT],
        ),
        ([{"from": "user", "value": "What?"}, {"from": "chatgpt", "value": "A bus."}], [HUMAN, GPT]),
    ],
)
def test_sharegpt_is_trimmed_at_the_ends(tmp_path: Path, turns: list[Any], kept: list[Any]) -> None:
    path = write(tmp_path / "a.json", [{"id": "wgByO4Y_0", "model": "", "conversations": turns}])
    problems = Problems(strict=True)
    (record,) = convert_records(Source(path), "ShareGPT", None, problems)
    assert record["conversations"] == kept


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([GPT, HUMAN], "no question of 'conversations' has an answer"),
        ([HUMAN, GPT, GPT], "message 2 is the assistant's, expected the user's"),
        ([HUMAN, EMPTY, HUMAN, GPT], "message 1 (assistant) is empty"),
    ],
)
def test_what_trimming_does_not_mend(tmp_path: Path, turns: list[Any], reason: str) -> None:
    problems = Problems()
    path = write(tmp_path / "a.json", [{"id": "a", "conversations": turns}])
    assert list(convert_records(Source(path), "sharegpt4v", None, problems)) == []
    assert [problem.reason for problem in problems.listed] == [f"id a: {reason}"]
