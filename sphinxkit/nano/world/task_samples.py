"""Samples of every task of ``sphinxkit.formatters.tasks`` out of scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sphinxkit.formatters import tasks
from sphinxkit.geometry import Box
from sphinxkit.nano.world import captions, questions
from sphinxkit.nano.world.phrases import (
    Thing,
    name_shape,
    referring_phrases,
    relation,
    things,
    unique_names,
)
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Scene, Shape
from sphinxkit.nano.world.shapes import SHAPES

Weights = Sequence[tuple[str, int]]
Maker = Callable[[Scene, Rng], list[Any]]

NUM_CHOICES = 4  # of multiple choice, at most
ABSENT_PERCENT = 12  # of the categories that detection is asked for; our choice
UNANSWERABLE_PERCENT = 40  # of VizWiz's questions; our choice
MAX_RELATIONS = 4
MAX_CATEGORIES = 3

_ANY: Weights = (("shapes", 5), ("single", 1), ("texts", 2), ("people", 2), ("mixed", 2), ("page", 1), ("chart", 2))
_NAMED: Weights = (("shapes", 4), ("single", 1), ("people", 1), ("mixed", 3), ("texts", 1))
_REGIONS: Weights = (("shapes", 5), ("mixed", 2), ("people", 1))

KINDS_OF_TASK: Mapping[str, Weights] = {
    "vqa": _ANY,
    "vizwiz": (("shapes", 3), ("mixed", 1), ("texts", 1)),
    "multiple_choice": _ANY,
    "detailed_caption": _NAMED,
    "caption": _NAMED,
    "rec": _REGIONS,
    "relation": _REGIONS,
    "reg": _REGIONS,
    "grounded_caption": _NAMED,
    "detection": _REGIONS,
    "layout": (("page", 1),),
    "text_detection": (("texts", 3), ("mixed", 1)),
    "pose": (("people", 3), ("mixed", 1)),
    "chart": (("chart", 1),),
    "classification": (("single", 5), ("people", 1), ("page", 1), ("chart", 1)),
}
"""The kinds of scenes that each task is about, and their whole-number weights; our choice."""


def _askable(scene: Scene, found: list[Thing]) -> list[Thing]:
    """In ``test`` only what training never sees is asked about."""
    return [thing for thing in found if scene.split != "test" or thing.is_held_out]


def _boxes(found: Sequence[Thing]) -> tuple[Box, ...]:
    return tuple(thing.rect.box for thing in found)


def _vqa(scene: Scene, rng: Rng) -> list[Any]:
    return [tasks.QuestionSample(x.text, x.answer) for x in questions.questions(scene, rng)]


def _vizwiz(scene: Scene, rng: Rng) -> list[Any]:
    if rng.chance(UNANSWERABLE_PERCENT) and (absent := questions.unanswerable(scene, rng)):
        return [tasks.QuestionSample(absent.text, absent.answer)]
    return _vqa(scene, rng)


def _multiple_choice(scene: Scene, rng: Rng) -> list[Any]:
    samples = []
    for question in questions.questions(scene, rng):
        wrong = rng.shuffled(question.others)[: NUM_CHOICES - 1]
        choices = rng.shuffled([question.answer, *wrong])
        if len(choices) > 1:
            right = choices.index(question.answer)
            samples.append(tasks.MultipleChoiceSample(question.text, tuple(choices), right))
    return samples


def _caption(scene: Scene, rng: Rng) -> list[Any]:
    return [captions.caption(scene, rng).sample] if things(scene) else []


def _detailed_caption(scene: Scene, rng: Rng) -> list[Any]:
    return [captions.detailed_caption(scene, rng).sample] if things(scene) else []


def _grounded_caption(scene: Scene, rng: Rng) -> list[Any]:
    return [captions.grounded_caption(scene)] if things(scene) else []


def _rec(scene: Scene, rng: Rng) -> list[Any]:
    samples = []
    for target in rng.shuffled(_askable(scene, things(scene))):
        phrases = referring_phrases(scene, target)
        if phrases:
            samples.append(tasks.RegionSample(rng.choice(phrases), target.rect.box, scene.geometry))
    return samples


def _reg(scene: Scene, rng: Rng) -> list[Any]:
    samples = []
    for target in rng.shuffled([thing for thing in _askable(scene, things(scene)) if thing.noun != "word"]):
        source = target.source
        name = name_shape(source, with_size=True) if isinstance(source, Shape) else target.name
        samples.append(tasks.RegionSample(name, target.rect.box, scene.geometry))
    return samples


def _relation(scene: Scene, rng: Rng) -> list[Any]:
    named = unique_names(scene)
    samples = []
    for subject in _askable(scene, named):
        for other in named:
            predicate = relation(subject.rect, other.rect) if other is not subject else None
            if predicate is not None:
                sides = [tasks.GroundedPhrase(f"the {thing.name}", (thing.rect.box,)) for thing in (subject, other)]
                samples.append(tasks.RelationSample(sides[0], predicate, sides[1], scene.geometry))
    return rng.shuffled(samples)[:MAX_RELATIONS]


def _detection(scene: Scene, rng: Rng) -> list[Any]:
    everything = [thing for thing in things(scene) if thing.noun != "word"]
    present = list(dict.fromkeys(thing.noun for thing in everything))
    present += [x.name for x in _askable(scene, everything) if x.name not in present and rng.chance(30)]
    chosen = rng.shuffled(list(dict.fromkeys(present)))[:MAX_CATEGORIES]
    absent = [noun for noun in (*SHAPES, "person") if noun not in present]
    samples = []
    for category in chosen:
        name = rng.choice(absent) if absent and rng.chance(ABSENT_PERCENT) else category
        boxes = _boxes([thing for thing in everything if name in (thing.noun, thing.name)])
        samples.append(tasks.DetectionSample(name, boxes, scene.geometry))
    return samples


def _layout(scene: Scene, rng: Rng) -> list[Any]:
    regions: dict[str, tuple[Box, ...]] = {}
    for block in scene.blocks:
        regions[block.kind] = (*regions.get(block.kind, ()), block.rect.box)
    return [tasks.LayoutSample(regions, scene.geometry)] if regions else []


def _text_detection(scene: Scene, rng: Rng) -> list[Any]:
    texts = tuple(tasks.GroundedPhrase(word.text, (word.rect.box,)) for word in scene.words)
    return [tasks.TextDetectionSample(texts, scene.geometry)] if texts else []


def _pose(scene: Scene, rng: Rng) -> list[Any]:
    return [
        tasks.PoseSample(person.keypoints, person.rect.box, scene.geometry) for person in rng.shuffled(scene.people)
    ]


def _chart(scene: Scene, rng: Rng) -> list[Any]:
    if scene.chart is None:
        return []
    return [tasks.ChartSample("\n".join(f"{bar.label} | {bar.value}" for bar in scene.chart.bars))]


def _classification(scene: Scene, rng: Rng) -> list[Any]:
    if scene.kind in ("page", "chart"):
        return [tasks.ClassificationSample(scene.kind)]
    found = things(scene)
    return [tasks.ClassificationSample(found[0].noun)] if len(found) == 1 else []


MAKERS: Mapping[str, Maker] = {
    "vqa": _vqa,
    "vizwiz": _vizwiz,
    "multiple_choice": _multiple_choice,
    "detailed_caption": _detailed_caption,
    "caption": _caption,
    "rec": _rec,
    "relation": _relation,
    "reg": _reg,
    "grounded_caption": _grounded_caption,
    "detection": _detection,
    "layout": _layout,
    "text_detection": _text_detection,
    "pose": _pose,
    "chart": _chart,
    "classification": _classification,
}
"""Task to the function that gives every sample of it that a scene holds; empty where it holds none."""
