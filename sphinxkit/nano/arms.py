"""The arms of the ablations: what is different about each, and which of SPHINX's claims it speaks for or against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sphinxkit.errors import RecipeError
from sphinxkit.formatters import tasks as task_family
from sphinxkit.nano.measures import Measure
from sphinxkit.nano.scores import ROWS
from sphinxkit.registry import suggest

ENCODERS = ("blip2_qformer", "clip_vit_large_patch14", "convnext_xxlarge", "dinov2_vit_giant_patch14")
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CLAIMS = ("weights", "text", "tasks", "embeddings", "sub_images")
"""In the order in which their arms are run: the cheaper ones first."""

_SMALL = {"size": 128, "sizes": ["tiny", "small"], "has_small_text": True, "point_grid": 128}
_TASKS = tuple(row.task for row in ROWS)


def _shared_wordings(instruction: str = "Answer:") -> dict[str, str]:
    """One instruction for every task; what a question is about still stands behind it."""
    wordings = {}
    for name in task_family.names():
        fields = [part.partition("}")[0] for part in task_family.create(name).wordings[0].split("{")[1:]]
        kept = [f"{{{key}}}" for key in fields if key != "classes"]  # a layout's classes are its instruction
        wordings[name] = " ".join([instruction, *kept])
    return wordings


SHARED = {"wordings": _shared_wordings()}


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm.

    Args:
        name: Of its results and runs.
        title: What is different about it.
        claims: That it speaks for or against.
        measures: What is measured at its end.
        recipe: Of ``recipes/nano``, that its training is derived from; None: nothing is trained.
        streams: Stream of the recipe to its share of a batch.
        options: Of the world, over the recipe's.
        encoders: Of its model.
        model: Recipe of its model.
        after: The arm whose model it starts from; None: random weights beside the trained encoders.
        beta: Weight of the real domain's model, for a mix.
    """

    name: str
    title: str
    claims: tuple[str, ...]
    measures: tuple[Measure, ...]
    recipe: str | None = "finetune"
    streams: Mapping[str, float] = field(default_factory=lambda: {"tasks": 1.0})
    options: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[str, ...] = ENCODERS
    model: str = "model"
    after: str | None = None
    beta: float | None = None


def make_arms() -> tuple[Arm, ...]:
    """Every arm, each behind those that it starts from."""
    answers = (Measure("answers", _TASKS),)
    captions = {
        "real": Measure("real", ("caption", "detailed_caption", "text_detection"), domain="real"),
        "synthetic": Measure("synthetic", ("grounded_caption", "detailed_caption", "text_detection")),
    }
    domains = tuple(captions.values())
    writing = (Measure("text", ("text",)), captions["synthetic"])
    small = (Measure("answers", ("rec", "detection", "text_detection", "vqa", "reg"), size=128, options=_SMALL),)
    beside = {"captions": 0.75, "text": 0.25}
    pretrain = "pretrain_synthetic"
    return (
        Arm("all", "all four encoders, own instructions", ("embeddings", "tasks"), answers),
        *(
            Arm(f"only_{name.partition('_')[0]}", f"{name} alone", ("embeddings",), answers, encoders=(name,))
            for name in ENCODERS
        ),
        Arm(
            "shared",
            "one shared instruction",
            ("tasks",),
            (Measure("answers", _TASKS, options=SHARED),),
            options=SHARED,
        ),
        Arm("one_view", "one view of 64 pixels", ("sub_images",), small, options=_SMALL),
        Arm(
            "sub_images",
            "one view and four sub-images",
            ("sub_images",),
            small,
            options=_SMALL,
            model="model_subimages",
        ),
        Arm("writing", "text alone, before any caption", ("text",), writing, pretrain, {"text": 1.0}),
        Arm("captions", "captions alone", ("text",), writing, pretrain, {"captions": 1.0}, after="writing"),
        Arm("captions_text", "captions, text beside", ("text",), writing, pretrain, beside, after="writing"),
        Arm("real", "the real domain", ("weights",), domains, "pretrain_real", beside),
        Arm("synthetic", "then the synthetic domain", ("weights",), domains, pretrain, beside, after="real"),
        *(
            Arm(f"beta_{beta:.2f}", f"mixed, beta {beta:g}", ("weights",), domains, None, beta=beta)
            for beta in BETAS[1:-1]
        ),
    )


def choose_arms(claim: str | None = None) -> tuple[Arm, ...]:
    """The arms of one claim, or all.

    Raises:
        RecipeError: There is no such claim.
    """
    if claim is not None and claim not in CLAIMS:
        raise RecipeError(
            f"ablations: there is no claim {claim!r}{suggest(claim, CLAIMS) or '.'} Claims: {', '.join(CLAIMS)}"
        )
    return tuple(arm for arm in make_arms() if claim is None or claim in arm.claims)
