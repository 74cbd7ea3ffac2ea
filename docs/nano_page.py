"""Fills the tables of docs/nano.md: the stages from the recipes, the scores from docs/nano_scores*.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sphinxkit.data.conversations import encode_sample
from sphinxkit.nano.perception.training import PerceptionPlan
from sphinxkit.nano.stages import STAGES
from sphinxkit.nano.stages.scores import table
from sphinxkit.nano.stages.steps import recipes, training_plan
from sphinxkit.recipe import build
from sphinxkit.training import TrainPlan
from sphinxkit.training.flops import llm_flops, vision_flops
from sphinxkit.training.streams import open_mixture
from sphinxkit.training.trainable_model import find_recipe

DOCS = Path(__file__).parent
PAGE = DOCS / "nano.md"
SCORES = {"scores": DOCS / "nano_scores.json", "scores of one view": DOCS / "nano_scores_one_view.json"}
NUM_SAMPLES = 200  # of a stream, that its lengths are taken from
TRAINED_PASSES = 3  # forward, and the backward pass as twice that


def trained_stages() -> Iterator[tuple[str, TrainPlan]]:
    for name in STAGES:
        if (recipes() / f"{name}.yaml").exists():
            yield name, training_plan(name, "runs/nano")


def stage_rows() -> Iterator[str]:
    perception = PerceptionPlan()
    views = perception.steps * perception.batch_size
    for name, plan in trained_stages():
        model = build(find_recipe(plan, recipes()))
        tokenizer, template, vision = model.tokenizer, model.conversation, model.vision
        assert tokenizer is not None
        assert template is not None
        assert vision is not None
        image = vision_flops(model)
        if name == "pretrain_real":
            yield f"| encoders | {perception.steps:,} | {views:,} views | | | {views * TRAINED_PASSES * image:.1e} |"
        count, tokens, learnt, flops = 0, 0.0, 0.0, 0.0
        for stream in plan.data.values():
            mixture = open_mixture(stream)
            samples = [mixture.read(ref) for ref, _ in zip(mixture.order(), range(NUM_SAMPLES), strict=False)]
            encoded = [encode_sample(sample, template, tokenizer) for sample in samples]
            images = [sample.type == "image-text" for sample in samples]
            lengths = [len(e.token_ids) + has * vision.num_tokens for e, has in zip(encoded, images, strict=True)]
            labels = sum(label != -100 for e in encoded for label in e.labels)
            drawn = (plan.steps or 0) * stream.batch_size
            share = drawn / NUM_SAMPLES
            count += drawn
            tokens += share * sum(lengths)
            learnt += share * labels
            flops += share * (llm_flops(model.llm, lengths, labels) + sum(images) * image)
        yield f"| {name} | {plan.steps:,} | {count:,} | {tokens:.1e} | {learnt:.1e} | {flops:.1e} |"


def stages() -> str:
    head = "| stage | steps | conversations and texts | tokens, image slots included | tokens learnt | FLOPs |"
    return "\n".join([head, "|---|---|---|---|---|---|", *stage_rows()])


def scores(path: Path) -> str:
    if not path.exists():
        return f"Not scored yet: there is no `docs/{path.name}`."
    return table(json.loads(path.read_text(encoding="utf-8")))


def updated(text: str, name: str, content: str) -> str:
    """The text with what stands between a pair of markers replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each")
    return f"{text.partition(begin)[0]}{begin}\n\n{content}\n\n{end}{text.partition(end)[2]}"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, content in {"stages": stages(), **{name: scores(path) for name, path in SCORES.items()}}.items():
        text = updated(text, name, content)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
