"""Compares a model with golden data of the public implementation.

Golden data are ``golden.json`` and ``golden.safetensors`` in a released-layout directory, with the images they speak of
in ``../images``: obtained by running the public implementation (see tests/golden/README.md).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sphinxkit import tensor_files
from sphinxkit.checkpoint.resolve import resolve
from sphinxkit.errors import DataError
from sphinxkit.formatters import IGNORE_INDEX

if TYPE_CHECKING:
    from sphinxkit.sphinx_model.model import SphinxModel

# Rounding in float32: the public implementation differs from itself by 8e-6 on logits of scale 8 and by 2e-6 on visual
# tokens when tensor parallelism or library versions change; ten times that is still far below any single mistake.
LOGITS_ATOL = 1e-4
VISUAL_ATOL = 2e-5
LOSS_ATOL = 1e-5
# Sums of log-likelihoods over some ten tokens
SCORE_ATOL = 1e-4
# 16-bit arithmetic (8 bits of mantissa in bfloat16) through encoders and decoder, on logits of scale 8
HALF_ATOL = 0.5
# Other devices interpolate the views in float16 in their own way: up to an fp16 step in 39 % of the pixels moves visual
# tokens by up to 4e-3 and logits by 2e-3 (measured with such pixels on a CPU); our choice leaves a factor of 2.5 and 5
OTHER_DEVICE_VISUAL_ATOL = 1e-2
OTHER_DEVICE_LOGITS_ATOL = 1e-2


@dataclass(frozen=True, slots=True)
class Comparison:
    """One compared quantity.

    Args:
        name: What was compared.
        difference: Largest absolute difference; for exact quantities, the number of differences.
        tolerance: Largest difference that counts as equal; None: reported only.
    """

    name: str
    difference: float
    tolerance: float | None

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.tolerance is None or self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "is_equal": self.is_equal,
        }


def _difference(ours: Tensor, golden: Tensor) -> float:
    if ours.shape != golden.shape:
        raise DataError(f"golden data: expected shape {tuple(golden.shape)}, the model gives {tuple(ours.shape)}")
    return float((ours.float().cpu() - golden).abs().max())


class GoldenData:
    """The golden data of one directory.

    Args:
        folder: Holds ``golden.json`` and ``golden.safetensors``.
    Raises:
        DataError: They are not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = [name for name in ("golden.json", "golden.safetensors") if not (self.folder / name).is_file()]
        if missing:
            raise DataError(
                f"{folder} holds no golden data of the public implementation: {' and '.join(missing)} not found"
            )
        self.facts: dict[str, Any] = json.loads((self.folder / "golden.json").read_text(encoding="utf-8"))
        with tensor_files.open(self.folder / "golden.safetensors") as opened:
            self.tensors: dict[str, Tensor] = {name: opened.read(name) for name in opened}

    def image(self, name: str) -> Path:
        """Path of one of the images."""
        source = next(fact["source"] for fact in self.facts["images"] if fact["name"] == name)
        return self.folder.parent / str(source)

    def batch(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and labels of some of its data-set samples: (B, S) each."""
        ids = torch.stack([self.tensors[f"dataset.{name}.input_ids"] for name in names])
        labels = torch.stack([self.tensors[f"dataset.{name}.labels"] for name in names])
        return ids, labels.masked_fill(labels == 0, IGNORE_INDEX)


def verify(
    checkpoint: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Comparison], None] | None = None,
) -> list[Comparison]:
    """Load a checkpoint and compare its results with golden data of the public implementation.

    Args:
        checkpoint: Directory (or hub id) with ``golden.json`` and ``golden.safetensors``, such as those in
            ``tests/golden``.
        device: Device of the model.
        dtype: Dtype of the weights; float32 is held to rounding.
        progress: Called with each compared quantity.
    Returns:
        All comparisons; see ``Comparison.is_equal``.
    Raises:
        DataError: There are no golden data.
        CheckpointError: The checkpoint cannot be loaded.
    """
    from sphinxkit.recipe.io import load

    golden = GoldenData(resolve(checkpoint))
    model = load(golden.folder, device=device, dtype=dtype)
    results = []
    for result in compare(model, golden):
        results.append(result)
        if progress is not None:
            progress(result)
    return results


def compare(model: SphinxModel, golden: GoldenData) -> Iterator[Comparison]:
    """Compare all user-visible results, one quantity at a time.

    Args:
        model: Loaded from the directory of the golden data. In float32 on a CPU the tolerances allow rounding only; on
            other devices and in 16 bit, fewer quantities have a tolerance, and it is looser.
        golden: Golden data of that checkpoint.
    """
    is_float32 = model.dtype == torch.float32
    exact = is_float32 and model.device.type == "cpu"

    def within(atol: float) -> float | None:
        return atol if exact else None

    facts, tensors = golden.facts, golden.tensors
    for fact in facts["images"]:
        pixels = model.preprocess(golden.image(fact["name"]))[0]
        sha256 = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        yield Comparison(f"pixels of {fact['name']}", float(sha256 != fact["sha256_float32"]), 0.0)
    with torch.no_grad():
        visual = model.encode_images(model.preprocess(golden.image("square")))
        visual_atol = VISUAL_ATOL if exact else OTHER_DEVICE_VISUAL_ATOL if is_float32 else None
        position = 0
        views = [key for key in tensors if key.startswith("visual_tokens.view")]
        for view in range(len(views)):
            tokens = tensors[f"visual_tokens.view{view}"]
            ours = visual[:, position + 1 : position + 1 + tokens.shape[1]]
            position += tokens.shape[1] + 2
            yield Comparison(f"visual tokens of view {view}", _difference(ours, tokens), visual_atol)
        token_ids = tensors["logits.tokens"]
        pair = model.preprocess([golden.image(name) for name in facts["logits"]["images"]])
        atol = LOGITS_ATOL if exact else OTHER_DEVICE_LOGITS_ATOL if is_float32 else HALF_ATOL
        yield Comparison("logits of text", _difference(model(token_ids), tensors["logits.text_only"]), atol)
        ours = model(token_ids, pair)
        yield Comparison("logits with an image", _difference(ours, tensors["logits.with_image"]), atol)
    yield from _compare_losses(model, golden, within(LOSS_ATOL))
    yield from _compare_scores(model, golden, within(SCORE_ATOL))
    yield from _compare_generation(model, golden, 0.0 if exact else None)


def _compare_losses(model: SphinxModel, golden: GoldenData, atol: float | None) -> Iterator[Comparison]:
    for fact in golden.facts["loss"]:
        token_ids, labels = golden.batch(fact["batch"])
        names = fact["images"]
        pixels = None if names is None else model.preprocess([golden.image(name) for name in names])
        with torch.no_grad():
            loss = model.loss(token_ids, labels, pixels)
        yield Comparison(f"loss, {fact['name']}", abs(float(torch.as_tensor(loss)) - fact["loss"]), atol)


def _compare_scores(model: SphinxModel, golden: GoldenData, atol: float | None) -> Iterator[Comparison]:
    for kind in ("evaluate_text", "evaluate_image"):
        fact = golden.facts[kind]
        contexts = fact["contexts"]
        continuations = [
            example.removeprefix(context) for example, context in zip(fact["examples"], contexts, strict=True)
        ]
        images = None if fact["images"] is None else [golden.image(name) for name in fact["images"]]
        scores = model.score(contexts, continuations, images)
        worst = max(
            abs(score.log_likelihood - expected) for score, expected in zip(scores, fact["log_likelihood"], strict=True)
        )
        yield Comparison(f"log-likelihoods, {kind.removeprefix('evaluate_')}", worst, atol)


def _compare_generation(model: SphinxModel, golden: GoldenData, atol: float | None) -> Iterator[Comparison]:
    """Greedy ids agree up to the shorter of the two (the public implementation lets shorter prompts write longer)."""
    for fact in golden.facts["generate"]:
        images = None if fact["images"] is None else [golden.image(name) for name in fact["images"]]
        for case, expected in fact["generate"].items():
            stop = {"eos_only": [], "with_stop_symbol": ["\n###"]}.get(case, expected.get("stop_symbols"))
            answers = model.generate(fact["prompts"], images, max_new_tokens=fact["max_gen_len"], stop=stop)
            wrong = sum(
                ours != theirs
                for answer, ids in zip(answers, expected["token_ids"], strict=True)
                for ours, theirs in zip(answer.token_ids, ids, strict=False)
            )
            yield Comparison(f"greedy ids, {fact['name']}, {case}", float(wrong), atol)
