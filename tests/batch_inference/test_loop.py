"""The loop beneath files, evaluation and servers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from sphinxkit.batch_inference import Request, answer_requests
from sphinxkit.generation import Sampling
from sphinxkit.sphinx_model import SphinxModel

SHORT = Sampling(max_new_tokens=6, stop=("\n###",))


def test_images_in_every_form(model: SphinxModel, golden: Path) -> None:
    path = golden / "images" / "wide.png"
    pixels = model.preprocess(path)[0]
    forms = [path, str(path), path.read_bytes(), pixels, model.encode_images(pixels[None])[0].detach(), None]
    wrong = [b"nothing", torch.zeros(3, 4, 4), golden / "gone.png"]
    requests = [Request(index, "What is it?", image, SHORT) for index, image in enumerate([*forms, *wrong])]
    answers = {answer.request.index: answer for answer in answer_requests(model, requests, batch_size=4)}
    [expected] = model.generate("What is it?", path, max_new_tokens=6)
    [blind] = model.generate("What is it?", max_new_tokens=6)
    assert [answers[index].generation for index in range(6)] == [expected] * 5 + [blind]
    told = [answers[index].error or "" for index in range(6, 9)]
    assert "not an image in a format" in told[0]
    assert "expected pixels (3, 224, 224)" in told[1]
    assert "gone.png: there is no such file" in told[2]


def test_pieces_come_while_others_run_and_requests_may_come_later(model: SphinxModel) -> None:
    prompts = ["Where is it, and why?", "Why?", "What is in the image?"]
    pieces: defaultdict[int, list[str]] = defaultdict(list)
    order: list[str] = []

    def requests():
        yield None  # nothing has come yet
        for index, prompt in enumerate(prompts):
            yield Request(index, prompt, None, Sampling(max_new_tokens=4 + 4 * index, stop=("\n###",)))
            order.append(f"taken {index}")
            yield from [None] * 10

    def on_text(request: Request, piece: str) -> None:
        pieces[request.index].append(piece)
        order.append(f"text {request.index}")

    answers = {}
    for answer in answer_requests(model, requests(), batch_size=2, on_text=on_text):
        assert answer.generation is not None
        answers[answer.request.index] = answer.generation
    assert sorted(answers) == [0, 1, 2]
    for index, prompt in enumerate(prompts):
        assert answers[index] == model.generate(prompt, max_new_tokens=4 + 4 * index)[0]
        assert "".join(pieces[index]) == answers[index].text
    assert order.index("text 0") < order.index("taken 1")  # the first runs before the second has come
