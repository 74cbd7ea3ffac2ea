"""A model that answers with its image's width, and files of questions about images of known widths."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sphinxkit.batch_inference import Answer, Request
from sphinxkit.errors import DataError
from sphinxkit.evaluation import Report, predictions
from sphinxkit.evaluation.run import evaluate
from sphinxkit.formatters import ConversationTemplate, sphinx_v1
from sphinxkit.generation import Generation
from sphinxkit.tilers.images import load_image

NAME = "gqa_testdev_balanced"


class Tokens:
    files = {"tokenizer.model": b"a tokenizer"}  # noqa: RUF012


@dataclass
class Eyes:
    """Answers with the image's width; is killed after some batches; refuses a prompt with the word "long"."""

    conversation: ConversationTemplate | None = field(default_factory=sphinx_v1)
    tokenizer: object = field(default_factory=Tokens)
    vision: object = "a tower"
    calls: list[int] = field(default_factory=list)
    limit: int = 100
    weight: float = 1.0
    dtype: torch.dtype = torch.float32
    recipe_yaml: str = "kind: model"
    backwards: bool = False

    @property
    def asked(self) -> int:
        return sum(self.calls)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.tensor([self.weight])}


def answer_requests(model: Any, requests: Iterable[Request], *, batch_size: int) -> Iterator[Answer]:
    """In the place of ``batch_inference``'s loop: batches are complete one after the other."""
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    waiting = list(requests)
    for start in range(0, len(waiting), batch_size):
        if len(model.calls) >= model.limit:
            raise KeyboardInterrupt
        batch = waiting[start : start + batch_size]
        model.calls.append(len(batch))
        for request in reversed(batch) if model.backwards else batch:
            assert (request.sampling.temperature, request.sampling.stop) == (0.0, ("\n###",))
            try:
                width = 0 if request.image is None else load_image(request.image).width
            except DataError as error:
                yield Answer(request, error=str(error))
                continue
            if "long" in request.prompt:
                yield Answer(request, error="prompt 0 has too many tokens")
            else:
                yield Answer(request, Generation(f" {width}\n", [1], "stop"))


@dataclass
class Files:
    """Seven questions (the ids repeat), each about an image as wide as its index plus ten; every answer is right."""

    folder: Path

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = [
            {"image_path": f"{i}.png", "question": f"q{i}", "question_id": -1, "gt_answers": str(i + 10)}
            for i in range(7)
        ]
        for index in range(7):
            Image.new("RGB", (index + 10, 4)).save(self.folder / f"{index}.png")
        self.write()

    model = staticmethod(Eyes)
    annotations = property(lambda self: self.folder / "a.json")
    output = property(lambda self: self.folder / "out" / "p.jsonl")

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.records))

    def evaluate(self, model: Any, **options: Any) -> Report:
        name = options.pop("benchmark", NAME)
        return evaluate(model, name, self.annotations, self.folder, self.output, **{"batch_size": 2} | options)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(predictions, "answer_requests", answer_requests)
    return Files(tmp_path)
