"""The variants that the ablations train: how each differs, and which of SPHINX's claims it tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sphinxkit.errors import RecipeError
from sphinxkit.formatters import tasks as task_family
from sphinxkit.nano.ablations.metrics import EvalSet
from sphinxkit.nano.stages.scores import ROWS
from sphinxkit.registry import suggest

ENCODERS = ("blip2_qformer", "clip_vit_large_patch14", "convnext_xxlarge", "dinov2_vit_giant_patch14")
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CLAIM_NAMES = ("weights", "text", "tasks", "embeddings", "sub_images")
"""In the order in which their variants are run: the cheaper ones first."""

_SMALL = {"size": 128, "sizes": ["tiny", "small"], "has_small_text": True, "point_grid": 128}
_TASKS = tuple(row.task for row in ROWS)


def _shared_wordings() -> dict[str, str]:
    """One instruction for all tasks; what the question asks about follows it."""
    wordings = {}
    for name in task_family.names():
        fields = [part.partition("}")[0] for part in task_family.create(name).wordings[0].split("{")[1:]]
        kept = [f"{{{key}}}" for key in fields if key != "classes"]  # a layout's classes are part of its instruction
        wordings[name] = " ".join(["Answer:", *kept])
    return wordings


SHARED = {"wordings": _shared_wordings()}


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of the ablations.

    Args:
        name: Name of its results and runs.
        title: How it differs.
        claims: The claims that it is compared for.
        eval_sets: What it is evaluated on.
        recipe: The recipe of ``recipes/nano`` that its training is derived from; None: nothing is trained.
        streams: Data stream of the recipe to its share of a batch.
        options: Options of the world; they replace the recipe's.
        encoders: Encoders of its model.
        model: Recipe of its model.
        after: The variant whose model it starts from; None: random weights, except the trained encoders.
        beta: Weight of the real domain's model, for a mix.
    """

    name: str
    title: str
    claims: tuple[str, ...]
    eval_sets: tuple[EvalSet, ...]
    recipe: str | None = "finetune"
    streams: Mapping[str, float] = field(default_factory=lambda: {"tasks": 1.0})
    options: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[str, ...] = ENCODERS
    model: str = "model"
    after: str | None = None
    beta: float | None = None


def make_variants() -> tuple[Variant, ...]:
    """All variants; each one follows those that it starts from."""
    answers = (EvalSet("answers", _TASKS),)
    captions = {
        "real": EvalSet("real", ("caption", "detailed_caption", "text_detection"), domain="real"),
        "synthetic": EvalSet("synthetic", ("grounded_caption", "detailed_caption", "text_detection")),
    }
    domains = tuple(captions.values())
    writing = (EvalSet("text", ("text",)), captions["synthetic"])
    small = (EvalSet("answers", ("rec", "detection", "text_detection", "vqa", "reg"), size=128, options=_SMALL),)
    beside = {"captions": 0.75, "text": 0.25}
    pretrain = "pretrain_synthetic"
    return (
        Variant("all", "all four encoders, own instructions", ("embeddings", "tasks"), answers),
        *(
            Variant(f"only_{name.partition('_')[0]}", f"{name} alone", ("embeddings",), answers, encoders=(name,))
            for name in ENCODERS
        ),
        Variant(
            "shared",
            "one shared instruction",
            ("tasks",),
            (EvalSet("answers", _TASKS, options=SHARED),),
            options=SHARED,
        ),
        Variant("one_view", "one view of 64 pixels", ("sub_images",), small, options=_SMALL),
        Variant(
            "sub_images",
            "one view and four sub-images",
            ("sub_images",),
            small,
            options=_SMALL,
            model="model_subimages",
        ),
        Variant("writing", "text alone, before any caption", ("text",), writing, pretrain, {"text": 1.0}),
        Variant("captions", "captions alone", ("text",), writing, pretrain, {"captions": 1.0}, after="writing"),
        Variant("captions_text", "captions, text beside", ("text",), writing, pretrain, beside, after="writing"),
        Variant("real", "the real domain", ("weights",), domains, "pretrain_real", beside),
        Variant("synthetic", "then the synthetic domain", ("weights",), domains, pretrain, beside, after="real"),
        *(
            Variant(f"beta_{beta:.2f}", f"mixed, beta {beta:g}", ("weights",), domains, None, beta=beta)
            for beta in BETAS[1:-1]
        ),
    )


def choose_variants(claim: str | None = None) -> tuple[Variant, ...]:
    """The variants of one claim, or all.

    Raises:
        RecipeError: There is no such claim.
    """
    if claim is not None and claim not in CLAIM_NAMES:
        hint = suggest(claim, CLAIM_NAMES) or "."
        raise RecipeError(f"ablations: there is no claim {claim!r}{hint} Claims: {', '.join(CLAIM_NAMES)}")
    return tuple(variant for variant in make_variants() if claim is None or claim in variant.claims)
