from __future__ import annotations

import re

import pytest

from sphinxkit.nano.world import COLORS, SHAPES, Rect, Scene, World
from sphinxkit.nano.world.phrases import (
    RELATIONS,
    Thing,
    article,
    counted,
    joined,
    place,
    plural,
    referring_phrases,
    relation,
    things,
)

NUM_SCENES = 120
SUPERLATIVES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}


def centre(thing: Thing) -> tuple[float, float]:
    return (thing.rect.x1 + thing.rect.x2) / 2, (thing.rect.y1 + thing.rect.y2) / 2


def matches(words: str, thing: Thing) -> bool:
    """Whether plain words ("small red circle", "person in red", 'word "KA"') are true of a thing."""
    attributes = {thing.noun, *thing.name.replace("person in ", "person in-").split()}
    size = getattr(thing.source, "size", None)
    wanted = words.replace("person in ", "person in-").split()
    return set(wanted) <= attributes | {size}


def resolve(phrase: str, scene: Scene) -> list[Thing]:
    """Everything that a referring phrase may mean, worked out anew from its words."""
    everything = things(scene)
    text = phrase.removeprefix("the ")
    for name, holds in RELATIONS.items():
        head, found, anchor = text.partition(f" {name} the ")
        if found:
            anchors = [thing for thing in everything if matches(anchor, thing)]
            assert len(anchors) == 1, phrase
            return [
                x for x in everything if matches(head, x) and x is not anchors[0] and holds(x.rect, anchors[0].rect)
            ]
    first, _, rest = text.partition(" ")
    if first in SUPERLATIVES:
        axis, sign = SUPERLATIVES[first]
        group = [thing for thing in everything if matches(rest, thing)]
        best = min(sign * centre(thing)[axis] for thing in group)
        return [thing for thing in group if sign * centre(thing)[axis] == best]
    return [thing for thing in everything if matches(text, thing)]


@pytest.mark.parametrize("kind", ["shapes", "mixed", "people"])
def test_referring_phrases_mean_one_thing(kind: str) -> None:
    kinds = set()
    for index in range(NUM_SCENES):
        scene = World(max_objects=8).scene_of_kind(index, kind)
        for target in things(scene):
            for phrase in referring_phrases(scene, target):
                assert [thing.source for thing in resolve(phrase, scene)] == [target.source], (phrase, index)
                kinds.add(re.sub("|".join([*COLORS, *SHAPES]), "*", phrase))
    assert len(kinds) > 5


def test_relations_by_hand() -> None:
    one = Rect(10, 10, 20, 20)
    assert relation(one, Rect(30, 12, 40, 22)) == "left of"
    assert relation(one, Rect(0, 12, 9, 22)) == "right of"
    assert relation(one, Rect(12, 40, 22, 50)) == "above"
    assert relation(one, Rect(12, 0, 22, 8)) == "below"
    assert relation(one, Rect(20, 15, 30, 25)) == "left of"  # touching
    assert relation(one, Rect(19, 30, 60, 40)) is None  # neither clearly above nor beside
    assert relation(one, Rect(15, 15, 25, 25)) is None  # overlapping


def test_relations_are_exclusive_and_turn_around() -> None:
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    for index in range(NUM_SCENES):
        found = things(World().scene_of_kind(index, "shapes"))
        for a in found:
            for b in found:
                if a is not b:
                    assert sum(holds(a.rect, b.rect) for holds in RELATIONS.values()) <= 1
                    assert turned[relation(a.rect, b.rect)] == relation(b.rect, a.rect)


def test_words() -> None:
    assert article("orange ring") == "an orange ring"
    assert article("red ring") == "a red ring"
    assert article('word "KA"') == 'the word "KA"'
    assert plural("red cross") == "red crosses"
    assert plural("person in red") == "people in red"
    assert counted("blue star", 1) == "a blue star"
    assert counted("blue star", 3) == "three blue stars"
    assert joined(["a"]) == "a"
    assert joined(["a", "b", "c"]) == "a, b and c"


def test_places() -> None:
    scene = World(size=(90, 90)).scene_of_kind(0, "single")
    assert place(Rect(0, 0, 20, 20), scene) == "in the top left"
    assert place(Rect(35, 35, 55, 55), scene) == "in the center"
    assert place(Rect(70, 35, 90, 55), scene) == "on the right"
    assert place(Rect(30, 70, 60, 90), scene) == "at the bottom"
    assert place(Rect(80, 80, 90, 90), scene) == "in the bottom right"
