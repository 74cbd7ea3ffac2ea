from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.batch_inference import BadRow, Defaults, Request, parse_request
from sphinxkit.generation import Sampling


def chat_prompt(messages) -> tuple[str, tuple[str, ...]]:
    return " | ".join(message["content"] for message in messages), ("END",)


def parse(row: Any, defaults: Defaults | None = None, index: int = 3):
    return parse_request(index, json.dumps(row).encode(), defaults or Defaults(), chat_prompt, Path("folder"))


def test_a_row_says_how_it_is_answered() -> None:
    row = {"id": 7, "prompt": "Why?", "image": "a/b.png", "max_new_tokens": 5, "temperature": 1, "top_p": 0.5}
    request = parse(row | {"stop": "x", "seed": 9, "meta": [1]}, Defaults(Sampling(stop=("y",))))
    assert isinstance(request, Request)
    assert (request.id, request.prompt, request.image) == (7, "Why?", Path("folder/a/b.png"))
    assert request.sampling == Sampling(5, 1, 0.5, ("x",), 9)
    assert request.meta == [1]


def test_defaults_the_templates_stop_and_a_seed_for_each_row() -> None:
    request = parse({"prompt": "Why?"}, Defaults(Sampling(temperature=1.0, seed=10)))
    assert request.sampling == Sampling(temperature=1.0, stop=("END",), seed=13)
    assert parse({"prompt": "a"}, Defaults(is_raw=True)).sampling.stop == ()
    assert parse({"prompt": "a"}, Defaults(Sampling(stop=("y",)))).sampling.stop == ("y",)
    assert parse({"prompt": "a", "stop": []}).sampling.stop == ()


def test_the_digest_tells_requests_apart() -> None:
    base = {"prompt": "Why?", "id": 1}
    others = [
        parse(base),
        parse({**base, "prompt": "Who?"}),
        parse({**base, "image": "x.png"}),
        parse({**base, "seed": 1}),
        parse({**base, "max_new_tokens": 3}),
        parse({**base, "id": 2}),
        parse(base, Defaults(facts={"dtype": "bf16"})),
    ]
    assert len({request.digest for request in others}) == len(others)
    assert parse({**base, "meta": 5, "image": None}).digest == others[0].digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "promt": 1}, "row 3: unknown field 'promt'; there are id, prompt, messages, image"),
        ({}, "expected either prompt or messages"),
        ({"prompt": "a", "messages": []}, "expected either prompt or messages"),
        ({"prompt": 4}, "prompt: expected str, got int"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens: expected int, got bool"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature: expected int or float, got str"),
        ({"prompt": "a", "stop": ["x", 1]}, "stop: expected a string or a list of strings"),
        ({"prompt": "  "}, "the prompt is empty"),
        (5, "expected a JSON object, got int"),
    ],
)
def test_bad_rows(row: Any, message: str) -> None:
    found = parse(row)
    assert isinstance(found, BadRow)
    assert message in found.error


def test_a_bad_row_keeps_its_id() -> None:
    assert parse({"id": "x", "prompt": 4}).id == "x"
    assert parse({"id": [1], "prompt": "a"}).id is None
    assert parse({"question_id": 5, "text": 4}).id == 5
