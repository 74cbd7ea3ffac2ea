"""Captions: by template and right in the synthetic domain, short and partly wrong in the real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sphinxkit.formatters.tasks import CaptionSample, GroundedCaptionSample, GroundedPhrase
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.phrases import (
    NUMBERS,
    Thing,
    article,
    counted,
    joined,
    name_person,
    name_shape,
    place,
    relation,
    things,
)
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Person, Scene, Shape
from sphinxkit.nano.world.shapes import SHAPES
from sphinxkit.nano.world.splits import is_held_out_pair
from sphinxkit.nano.world.words import draw_word

WRONG_PERCENT = 20
"""Captions of the real domain's ``train`` and ``val`` that name something the scene does not show; our choice."""


@dataclass(frozen=True, slots=True)
class CaptionDraft:
    """A caption and whether it is true.

    Args:
        text: The words.
        is_wrong: It names something that the scene does not show.
    """

    text: str
    is_wrong: bool

    @property
    def sample(self) -> CaptionSample:
        """For the tasks ``caption`` and ``detailed_caption``."""
        return CaptionSample(self.text)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _groups(found: Sequence[Thing]) -> list[tuple[str, list[Thing]]]:
    """Things of one name together, in the order of the first of each."""
    groups: dict[str, list[Thing]] = {}
    for thing in found:
        groups.setdefault(thing.name, []).append(thing)
    return list(groups.items())


def _other(thing: Thing, scene: Scene, rng: Rng) -> Thing:
    """The thing as something else that the scene does not show (nor, outside ``test``, anything held out)."""
    shown = {other.name for other in things(scene)}
    is_test = scene.split == "test"
    while True:
        source = thing.source
        changed: Thing
        if isinstance(source, Shape):
            other: Shape
            if rng.chance(50):
                other = replace(source, color=rng.choice(tuple(COLORS)))
            else:
                other = replace(source, shape=rng.choice(SHAPES))
            if is_held_out_pair(other.color, other.shape) and not is_test:
                continue
            changed = Thing(other.shape, name_shape(other), thing.rect, other)
        elif isinstance(source, Person):
            dressed = replace(source, color=rng.choice(tuple(COLORS)))
            changed = Thing("person", name_person(dressed), thing.rect, dressed)
        else:
            word = replace(source, text=draw_word(rng, is_test))
            changed = Thing("word", f'word "{word.text}"', thing.rect, word)
        if changed.name not in shown:
            return changed


def _with_mistake(found: list[Thing], mentioned: int, scene: Scene, rng: Rng) -> tuple[list[Thing], bool]:
    """In ``WRONG_PERCENT`` of the captions that may be wrong, one of the first things as something else."""
    if scene.domain != "real" or scene.split == "test" or not rng.chance(WRONG_PERCENT):
        return found, False
    wrong = rng.below(min(mentioned, len(found)))
    return [_other(x, scene, rng) if index == wrong else x for index, x in enumerate(found)], True


def caption(scene: Scene, rng: Rng) -> CaptionDraft:
    """One sentence in the synthetic domain, some words in the real one.

    Args:
        scene: A scene of at least one thing.
        rng: For the real domain's carelessness.
    """
    found = things(scene)
    if scene.domain == "synthetic":
        between = relation(found[0].rect, found[1].rect) if len(found) == 2 else None
        if between:
            return CaptionDraft(_sentence(f"{article(found[0].name)} {between} {article(found[1].name)}"), False)
        return CaptionDraft(_sentence(joined([counted(name, len(group)) for name, group in _groups(found)])), False)
    mentioned = rng.between(1, min(3, len(found)))
    found, is_wrong = _with_mistake(rng.shuffled(found), mentioned, scene, rng)
    names = [thing.name for thing in found[:mentioned]]
    names = list(dict.fromkeys(names))
    style = rng.below(4)
    text = (", ".join(names), " and ".join(names), f"picture of {joined(names)}", f"{joined(names)} photo")[style]
    return CaptionDraft(text, is_wrong)


def detailed_caption(scene: Scene, rng: Rng) -> CaptionDraft:
    """A sentence on everything, from left to right; in the real domain on some things only.

    Args:
        scene: A scene of at least one thing.
        rng: For the real domain's carelessness.
    """
    found, is_wrong = things(scene), False
    if scene.domain == "real":
        mentioned = rng.between(1, len(found))
        found, is_wrong = _with_mistake(found, mentioned, scene, rng)
        found = found[:mentioned]
        opening = ""
    else:
        opening = "There is one thing. " if len(found) == 1 else f"There are {NUMBERS[len(found)]} things. "
    sentences = []
    for thing in found:
        name = name_shape(thing.source, with_size=True) if isinstance(thing.source, Shape) else thing.name
        sentence = f"{article(name)} is {place(thing.rect, scene)}"
        if isinstance(thing.source, Person) and thing.source.raised:
            raised = thing.source.raised
            sentence += " with both arms raised" if len(raised) == 2 else f" with the {raised[0]} arm raised"
        sentences.append(_sentence(sentence))
    return CaptionDraft(opening + " ".join(sentences), is_wrong)


def grounded_caption(scene: Scene) -> GroundedCaptionSample:
    """A true sentence that names everything once, with boxes; the same in both domains.

    Args:
        scene: A scene of at least one thing.
    """
    groups = _groups(things(scene))
    phrases = [counted(name, len(group)) for name, group in groups]
    phrases[0] = phrases[0][0].upper() + phrases[0][1:]
    text = joined(phrases) + "."
    grounded = []
    start = 0
    for phrase, (_, group) in zip(phrases, groups, strict=True):
        start = text.index(phrase, start)
        grounded.append(GroundedPhrase(phrase, tuple(thing.rect.box for thing in group), start))
        start += len(phrase)
    return GroundedCaptionSample(text, tuple(grounded), scene.geometry)
