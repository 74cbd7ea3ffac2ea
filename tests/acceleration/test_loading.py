"""``sphinxkit.load(accelerate=)``, and the whole package without ``acceleration``."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit.acceleration import CompiledAccelerator, FusedAccelerator
from sphinxkit.acceleration.compiled import compiler_fault
from sphinxkit.errors import DataError
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.lora import add_lora
from sphinxkit.training.plan import LoraPlan

IMAGE = str(Path(__file__).parents[2] / "docs" / "images" / "nano_scene.png")
PROMPTS = ["a", "There is a red square"]


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "llama_ens_light"


def answers(model: SphinxModel, **options: object) -> list[list[int]]:
    options = {"max_new_tokens": 12, "stop": None, **options}
    found = model.generate(PROMPTS, images=[IMAGE, None], **options)  # type: ignore[arg-type]
    return [answer.token_ids for answer in found]


def is_fused(model: SphinxModel) -> bool:
    accelerator = model.llm.accelerator
    assert isinstance(accelerator, FusedAccelerator)
    return accelerator.current(model.llm) is not None


def test_text_is_the_same_in_every_mode(folder: Path) -> None:
    plain = sphinxkit.load(folder, accelerate=None)
    assert plain.llm.accelerator is None
    auto = sphinxkit.load(folder)
    assert not is_fused(auto)
    for options in ({}, {"temperature": 0.8, "seed": 3}, {"num_draft_tokens": 3}):
        assert answers(auto, **options) == answers(plain, **options)
    assert is_fused(auto)
    assert auto.score(PROMPTS, [" it", " on"]) == plain.score(PROMPTS, [" it", " on"])
    sessions = [model.session(IMAGE) for model in (auto, plain)]
    for question in ("What?", "Where?"):
        texts = [session.ask(question, max_new_tokens=6) for session in sessions]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_compiled_text_is_the_same(folder: Path) -> None:
    if compiler_fault(torch.device("cpu")) is not None:
        pytest.skip("there is no compiler")
    compiled = sphinxkit.load(folder, accelerate="compile")
    assert type(compiled.llm.accelerator) is CompiledAccelerator
    assert answers(compiled) == answers(sphinxkit.load(folder, accelerate=None))


def test_training_does_not_prepare_and_learns_the_same(folder: Path) -> None:
    """A step before the first text, and one behind it."""
    gradients = []
    for mode in ("auto", None):
        model = sphinxkit.load(folder, accelerate=mode)
        ids = torch.arange(3, 13)[None]
        for step in range(2):
            model.zero_grad()
            model.train().loss(ids, ids).backward()  # type: ignore[union-attr]
            if mode == "auto" and step == 0:
                assert not is_fused(model.eval())
            answers(model.eval())
        gradients.append([parameter.grad for parameter in model.llm.parameters()])
    assert is_fused(sphinxkit.load(folder)) is False
    for one, two in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, two)


def test_four_threads_may_start_together(folder: Path) -> None:
    model = sphinxkit.load(folder)
    expected, found = answers(sphinxkit.load(folder, accelerate=None)), []
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        found.append(answers(model))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_copies_pickles_and_saved_models_say_the_same(folder: Path, tmp_path: Path) -> None:
    model = sphinxkit.load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = answers(model)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    model.save(tmp_path / "saved")
    for same in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        sphinxkit.load(tmp_path / "saved"),
    ):
        assert answers(same) == expected
        assert is_fused(same)


def test_a_loaded_state_and_an_adapter_are_heard(folder: Path) -> None:
    model, plain = sphinxkit.load(folder), sphinxkit.load(folder, accelerate=None)
    first = answers(model)
    for each in (model, plain):
        other = {name: tensor * 1.3 if "mlp" in name else tensor for name, tensor in each.state_dict().items()}
        each.load_state_dict(other)
    assert is_fused(model)
    assert answers(model) == answers(plain) != first
    for each in (model, plain):
        torch.manual_seed(0)
        add_lora(each.llm, LoraPlan(2, 4.0))
        for name, parameter in each.llm.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter)
    assert not is_fused(model)
    assert answers(model) == answers(plain)
    assert not is_fused(model)


def test_the_dtype_may_be_a_name(folder: Path) -> None:
    assert sphinxkit.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert sphinxkit.build("sphinx_micro", dtype="float16", device="meta").dtype == torch.float16


def test_other_modes_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="accelerate: expected 'auto', 'compile' or None, got 'fast'"):
        sphinxkit.load(folder, accelerate="fast")  # type: ignore[arg-type]


WITHOUT = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sphinxkit.acceleration"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
import sphinxkit

for family in ("llama", "training", "checkpoint", "generation"):
    package = importlib.import_module(f"sphinxkit.{family}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
model = sphinxkit.load(sys.argv[1], accelerate=None)
ids = torch.arange(3, 13)[None]
assert model(ids).shape[:2] == (1, 10)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(2):
    loss = model.loss(ids, ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
assert losses[1] < losses[0]
[answer] = model.generate("a", max_new_tokens=3, stop=None)
assert answer.token_ids
try:
    sphinxkit.load(sys.argv[1])
except ModuleNotFoundError as error:
    assert "blocked" in str(error)
else:
    raise SystemExit("acceleration was not blocked")
"""


@pytest.mark.slow
def test_everything_but_speed_works_without_it(folder: Path) -> None:
    code = textwrap.dedent(WITHOUT)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
