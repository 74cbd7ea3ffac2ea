from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sphinxkit
from sphinxkit.sphinx_model import SphinxModel

QUESTIONS = (
    "What is in the image?",
    "Where?",
    "Is it red or blue, or is it something else altogether?",
    "Why is it so?",
)
IMAGES = ("wide.png", None, "tall.png", "wide.png", None)


@pytest.fixture(scope="session")
def model(golden: Path) -> SphinxModel:
    return sphinxkit.load(golden / "llama_ens")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Eleven rows with images and without, of all lengths."""
    return [
        {
            "id": f"q{index}",
            "prompt": QUESTIONS[index % 4] + " Tell me." * (index % 3),
            "image": IMAGES[index % 5],
            "max_new_tokens": 2 + 3 * (index % 4),
        }
        for index in range(11)
    ]


@pytest.fixture
def write(tmp_path: Path, golden: Path) -> Callable[..., Path]:
    """Writes an input file beside the images."""

    def build(rows: list[Any], name: str = "in.jsonl") -> Path:
        for image in ("wide.png", "tall.png"):
            target = tmp_path / image
            if not target.exists():
                target.write_bytes((golden / "images" / image).read_bytes())
        path = tmp_path / name
        path.write_bytes(
            b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"
        )
        return path

    return build


@pytest.fixture
def expected(model: SphinxModel, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """What ``generate`` gives for each row by itself."""

    def compute(rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        found = []
        for index, row in enumerate(rows):
            prompt, stop = model.chat_prompt([{"role": "user", "content": row["prompt"]}])
            image = tmp_path / row["image"] if row.get("image") else None
            seed = None if "seed" not in options else options["seed"] + index
            [answer] = model.generate(
                prompt,
                image,
                row.get("max_new_tokens", 8),
                stop=stop,
                **{**options, **({} if seed is None else {"seed": seed})},
            )
            fields = {"index": index, "text": answer.text.strip(), "token_ids": answer.token_ids}
            fields["finish_reason"] = answer.finish_reason
            found.append({**fields, "id": row["id"]} if "id" in row else fields)
        return found

    return compute
