"""The ablations' metrics, against models whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import RecipeError
from sphinxkit.formatters import create as create_template
from sphinxkit.nano.ablations import metrics
from sphinxkit.nano.ablations.metrics import EvalSet, TaskMetrics, evaluate_variant, summarize
from sphinxkit.nano.stages.steps import recipes
from sphinxkit.recipe import build
from sphinxkit.tokenizer import Tokenizer

SURE = 30.0  # logit of the right token; that of all others is 0
LOSS_ATOL = 1e-5  # float32, mean of a few hundred tokens


class Knower:
    """Tells every token rightly, apart from every ``wrong``-th row's last one that is learnt: the separator."""

    class _Vision:
        image_size, num_tokens = 64, 5

    class _Llm:
        max_seq_len = 1024

    def __init__(self, wrong: int | None = None) -> None:
        self.tokenizer: Any = Tokenizer(recipes() / "tokenizer.model")
        self.conversation = create_template("sphinx_v1")
        self.vision, self.llm, self.wrong, self.rows = self._Vision(), self._Llm(), wrong, 0

    def __call__(self, token_ids: Tensor, pixels: Tensor | None, image_rows: Sequence[int]) -> Tensor:
        assert (pixels is None) == (not image_rows)
        following = torch.cat([token_ids[:, 1:], torch.zeros(len(token_ids), 1, dtype=torch.int64)], dim=1)
        for row in range(len(token_ids)):
            self.rows += 1
            if self.wrong is not None and self.rows % self.wrong == 0:
                last = int(torch.nonzero(token_ids[row])[-1])
                following[row, last - 2] = 5
        return torch.nn.functional.one_hot(following, self.tokenizer.vocab_size) * SURE


def test_right_answers() -> None:
    found = evaluate_variant(Knower(), EvalSet("answers", ("vqa", "rec", "text")), 6)  # type: ignore[arg-type]
    assert list(found) == ["vqa", "rec", "text"]
    for answers in found.values():
        assert answers.exact == answers.token_accuracy == 1.0
        assert answers.loss == pytest.approx(0.0, abs=LOSS_ATOL)


def test_one_wrong_token_spoils_its_answer() -> None:
    found = evaluate_variant(Knower(wrong=4), EvalSet("answers", ("rec",)), 8)["rec"]  # type: ignore[arg-type]
    assert found.exact == 6 / 8
    # a box is six tokens, then the separator
    assert found.token_accuracy == pytest.approx(1 - 2 / (8 * 7))
    assert found.loss == pytest.approx(2 / (8 * 7) * SURE, abs=LOSS_ATOL)


def test_losses_are_the_models_own(micro_recipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of several rows, against one sample at a time through the model's loss."""
    monkeypatch.setattr(metrics, "BATCH_SIZE", 3)
    torch.manual_seed(0)
    model = build(micro_recipes / "model.yaml").eval()
    assert model.vision is not None
    seen: list[Any] = []
    make = metrics.ExampleMaker.__call__

    def remember(self: Any, sample: Any) -> Any:
        seen.append(make(self, sample))
        return seen[-1]

    monkeypatch.setattr(metrics.ExampleMaker, "__call__", remember)
    found = evaluate_variant(model, EvalSet("answers", ("vqa",), "real"), 5)["vqa"]
    total, count = 0.0, 0
    with torch.no_grad():
        for example in seen:
            ids, labels = torch.tensor([example.token_ids]), torch.tensor([example.labels])
            loss, learnt = model.loss(ids, labels, example.pixels[None], reduction="none")
            total, count = total + loss.item(), count + int(learnt)
    assert len(seen) == 5
    assert found.loss == pytest.approx(total / count, abs=LOSS_ATOL)


def test_summaries() -> None:
    two = {"vqa": TaskMetrics(1.0, 0.5, 0.25), "rec": TaskMetrics(3.0, 0.7, 0.75)}
    assert summarize(EvalSet("answers", ("vqa", "rec")), two) == {
        "answers.loss": 2.0,
        "answers.token_accuracy": pytest.approx(0.6),
        "answers.exact": 0.5,
    }
    text = {"text": TaskMetrics(2.0, 0.1, 0.0)}
    assert summarize(EvalSet("text", ("text",)), text) == {"text.perplexity": math.exp(2.0)}


def test_a_model_without_words() -> None:
    model = Knower()
    model.tokenizer = None
    with pytest.raises(RecipeError, match="evaluate answers: the model has no tokenizer or no template"):
        evaluate_variant(model, EvalSet("answers", ("vqa",)), 1)  # type: ignore[arg-type]
