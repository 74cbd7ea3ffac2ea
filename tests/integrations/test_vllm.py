"""vLLM's Transformers backend beside sphinxkit's own generation."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit import nano
from sphinxkit.integrations.vllm import ARCHITECTURE, BACKEND, register
from sphinxkit.nano.world import World, render

COUNT = 20
TIE = 1e-3  # of the two best logits: float32 through other kernels
QUESTIONS = ("How many shapes are there?", "What is in the picture?", "Where is the red circle?", "Is there a star?")


def test_register_names_the_architecture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    registry = SimpleNamespace(get_supported_archs=known.keys, register_model=known.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    register()
    known[ARCHITECTURE] += " as it was"
    register()
    assert known == {ARCHITECTURE: f"{BACKEND} as it was"}
    from transformers import AutoConfig

    assert AutoConfig.for_model("sphinx").model_type == "sphinx"


@pytest.mark.integration  # an editable installation keeps the entry points of its time
def test_the_entry_point_registers() -> None:
    [found] = [each for each in entry_points(group="vllm.general_plugins") if each.name == "sphinxkit"]
    assert found.load() is register


def _gap_at(model: Any, prompt: str, image: Any, answer: list[int]) -> float:
    """Distance of the two best logits behind an answer's beginning."""
    ids = torch.tensor([model.tokenizer.encode(prompt, bos=True) + answer])
    with torch.no_grad():
        best = model(ids, pixels=None if image is None else model.preprocess([image]))[0, -1].topk(2).values
    return float(best[0] - best[1])


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_answers_are_those_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with an image and without stand in one batch."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    vllm = pytest.importorskip("vllm")
    folder = sphinxkit.convert(nano.path(), tmp_path / "nano_hf", format="hf")
    model = sphinxkit.load(folder)
    images = [None if n % 5 == 4 else render(World(size=128).scene(n)) for n in range(COUNT)]
    asked = [QUESTIONS[n % len(QUESTIONS)] for n in range(COUNT)]
    prompts, (stops, *_) = zip(*map(model.chat_prompt, asked), strict=True)
    ours = model.generate(list(prompts), images, max_new_tokens=30, stop=stops)

    engine = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.1)
    chats = []
    for question, image in zip(asked, images, strict=True):
        seen = [] if image is None else [{"type": "image_pil", "image_pil": image}]
        chats.append([{"role": "user", "content": [*seen, {"type": "text", "text": question}]}])
    made = engine.chat(chats, vllm.SamplingParams(temperature=0, max_tokens=30, stop=list(stops)), use_tqdm=False)

    equal = 0
    for prompt, image, want, found in zip(prompts, images, ours, made, strict=True):
        got = found.outputs[0]
        if got.text.strip() == want.text.strip():
            equal += 1
            continue
        pairs = zip(want.token_ids, got.token_ids, strict=False)
        same = next(n for n, (a, b) in enumerate(pairs) if a != b)
        assert _gap_at(model, prompt, image, list(want.token_ids[:same])) < TIE, (want.text, got.text)
    assert equal >= 0.9 * COUNT
