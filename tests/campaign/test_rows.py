"""Hostile rows and records through generate --input, score, evaluate and convert-data: each costs itself alone."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sphinxkit
from sphinxkit.batch_inference import answer_file
from sphinxkit.data.converters import Source
from sphinxkit.generation import Sampling
from tests.campaign import trial
from tests.data.converters.test_convert import LAYOUTS

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(7200)]
NUM_ROWS = 3000
NUM_FILES = 2000
NUM_EVALUATIONS = 60
SEED = 2311
ROWS: tuple[dict[str, Any], ...] = (
    {"id": 1, "prompt": "How many?", "max_new_tokens": 2, "temperature": 0.0, "top_p": 1.0, "seed": 3, "stop": ["x"]},
    {"id": "a", "prompt": "What is it?", "image": "a.png", "meta": {"k": [1, 2]}, "max_new_tokens": 1},
    {"messages": [{"role": "user", "content": "<image>\nRed?"}], "image": "a.png", "max_new_tokens": 2},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "?"},
        ]
    },
    {"question_id": 7, "text": "Is it?", "image": "a.png", "category": "conv"},
)
DEEP = '{"prompt": "x", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}"
LINES = (
    DEEP,
    DEEP[:50_000],
    '{"prompt": "\\ud800"}',
    '{"prompt": "x", "seed": 1e400}',
    "[]",
    "null",
    '"x"',
    "{",
    "\x00",
    "NaN",
)


def damaged_json(value: Any, rng: random.Random) -> bytes:
    """A JSON document with changed values or changed bytes."""
    if rng.random() < 0.3:
        return trial.damaged_bytes(json.dumps(value).encode(), rng)
    try:
        return json.dumps(trial.damaged(value, rng), default=repr).encode("utf-8", "surrogatepass")
    except (TypeError, OverflowError):  # what the change made is no JSON
        return trial.damaged_bytes(json.dumps(value).encode(), rng)


def test_rows_of_generate(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    model = sphinxkit.load("nano")
    sound = b'{"id": "sound", "prompt": "How many?", "image": "a.png", "max_new_tokens": 3}'
    rows = [sound]
    while len(rows) < NUM_ROWS:
        row = rng.choice(LINES).encode() if rng.random() < 0.1 else damaged_json(rng.choice(ROWS), rng)
        row = row.replace(b"\n", b" ").replace(b"\r", b" ").strip()
        rows += [row] * bool(row) + [sound] * (rng.random() < 0.05)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(rows) + b"\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = answer_file(model, source, output, Sampling(max_new_tokens=2))
    assert summary.is_complete
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [answer["index"] for answer in answers] == list(range(len(rows)))
    found = {answer["text"] for answer, row in zip(answers, rows, strict=True) if row == sound}
    (tmp_path / "one.jsonl").write_bytes(sound)
    answer_file(model, tmp_path / "one.jsonl", tmp_path / "one.out.jsonl")
    assert found == {json.loads((tmp_path / "one.out.jsonl").read_text())["text"]}
    assert all(("error" in answer) != ("text" in answer) for answer in answers)
    assert not any("Traceback" in answer.get("error", "") for answer in answers)
    before = output.read_bytes()
    again = answer_file(model, source, output, Sampling(max_new_tokens=2))
    assert (again.num_answered, again.num_skipped) == (0, summary.num_answered)
    assert output.read_bytes() == before
    trial.say({"rows": len(rows), "answered": summary.num_answered, "errors": summary.num_errors}, "generate --input")


def test_files_of_score(golden: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    files: dict[str, tuple[Any, Any]] = {}
    for path in sorted((golden / "scoring").glob("*.annotations.json")):
        name = path.name.removesuffix(".annotations.json")
        asked = json.loads(path.read_text())[:3]
        answers = json.loads((path.parent / f"{name}.predictions.json").read_text())
        files[name] = asked, answers["predictions"][:3]
    yes = [{"question_id": str(n), "image_path": f"color/{n // 2}.jpg", "gt_answers": "yes"} for n in range(4)]
    files["MME_benchmark"] = yes, [{"question_id": str(n), "answer": "yes"} for n in range(4)]
    votes = {"questions": [{"question_id": 1, "image_id": 2, "question": "q"}]}
    files["vqav2_val"] = (
        {**votes, "annotations": [{"question_id": 1, "image_id": 2, "answers": [{"answer": "a"}] * 10}]},
        [{"question_id": 1, "answer": "a"}],
    )
    counts: Counter[str] = Counter()
    faults: dict[str, bytes] = {}
    one, two = tmp_path / "a.json", tmp_path / "p.json"
    for name in files:
        one.write_text(json.dumps(files[name][0]))
        two.write_text(json.dumps(files[name][1]))
        counts[f"{name} {trial.outcome(lambda name=name: sphinxkit.score(name, one, two).to_dict())}"] += 1
    for _ in range(NUM_FILES):
        name = rng.choice(sorted(files))
        data = [json.dumps(each).encode() for each in files[name]]
        which = rng.randrange(2)
        data[which] = damaged_json(files[name][which], rng)
        one.write_bytes(data[0])
        two.write_bytes(data[1])
        said = trial.outcome(lambda name=name: sphinxkit.score(name, one, two).to_dict())
        counts[said[:60]] += 1
        if said.startswith("FAULT"):
            faults.setdefault(f"{name}: {said}", data[which])
    trial.say(counts, "score")
    assert not faults, trial.shown(faults)


def test_files_of_evaluate(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    model = sphinxkit.load("nano")
    asked = [{"question_id": str(n), "image_path": "a.png", "question": "Red?", "gt_answers": "yes"} for n in range(3)]
    counts: Counter[str] = Counter()
    faults: dict[str, bytes] = {}
    source = tmp_path / "a.json"
    for index in range(NUM_EVALUATIONS):
        data = damaged_json(asked, rng)
        source.write_bytes(data)
        output = tmp_path / f"{index}.jsonl"
        said = trial.outcome(
            lambda output=output: sphinxkit.evaluate(model, "vsr_val", source, tmp_path, output, max_new_tokens=1)
        )
        counts[said[:60]] += 1
        if said.startswith("FAULT"):
            faults.setdefault(said, data)
    trial.say(counts, "evaluate")
    assert not faults, trial.shown(faults)


def test_files_of_convert_data(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    layouts = LAYOUTS | {"llava": ("llava", None, {"a.json": [{"id": "1", "image": "a.jpg", "conversations": turns}]})}
    counts: Counter[str] = Counter()
    faults: dict[str, bytes] = {}
    for index in range(NUM_FILES):
        layout = rng.choice(sorted(layouts))
        name, task, files = layouts[layout]
        folder = tmp_path / str(index)
        folder.mkdir()
        chosen = rng.choice(sorted(files))
        for file, content in files.items():
            (folder / file).write_bytes(damaged_json(content, rng) if file == chosen else json.dumps(content).encode())
        companion = folder / "companion.json"
        source = Source(
            folder if name == "refcoco" else folder / "a.json",
            companion if companion.exists() else None,
            "train" if name in ("ocrvqa", "refcoco") else None,
        )
        output = tmp_path / "out.jsonl"
        said = trial.outcome(
            lambda source=source, name=name, task=task, output=output: sphinxkit.convert_data(
                source, name, task, output
            )
        )
        counts[said[:60]] += 1
        if said.startswith("FAULT"):
            faults.setdefault(f"{layout}: {said}", (folder / chosen).read_bytes())
        elif said == "fine":
            counts["conversations"] += sum(
                bool(json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()
            )
        assert not trial.leftovers(tmp_path)
    trial.say(counts, "convert-data")
    assert not faults, trial.shown(faults)
