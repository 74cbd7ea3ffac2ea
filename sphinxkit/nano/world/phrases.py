"""Phrases for objects in a scene, and which of them are unambiguous."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sphinxkit.nano.world.scene import Person, Rect, Scene, Shape, Word
from sphinxkit.nano.world.splits import is_held_out_pair

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"cross": "crosses", "person": "people"}
MARGIN = 4
"""Pixels by which the leftmost of its kind is farther left than the next, for each whole 128 of the picture's short
side (at least one); our choice."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Something in a scene that has a name.

    Args:
        noun: What it is: "circle", "person", "word".
        name: Name with colour or text: "red circle", "person in red", 'word "KAB"'.
        rect: Its pixels' extent.
        source: What the scene holds.
    """

    noun: str
    name: str
    rect: Rect
    source: Shape | Person | Word

    @property
    def is_held_out(self) -> bool:
        """Whether it may be asked about in ``test``: a shape only as a pair that training never sees."""
        return not isinstance(self.source, Shape) or is_held_out_pair(self.source.color, self.source.shape)


def name_shape(shape: Shape, *, with_size: bool = False) -> str:
    """What a shape is called: "red circle" or "small red circle"."""
    name = f"{shape.color} {shape.shape}"
    return f"{shape.size} {name}" if with_size else name


def name_person(person: Person) -> str:
    """What a person is called: "person in red"."""
    return f"person in {person.color}"


def things(scene: Scene) -> list[Thing]:
    """Everything with a name, from left to right."""
    found = [
        *(Thing(x.shape, name_shape(x), x.rect, x) for x in scene.shapes),
        *(Thing("person", name_person(x), x.rect, x) for x in scene.people),
        *(Thing("word", f'word "{x.text}"', x.rect, x) for x in scene.words),
    ]
    return sorted(found, key=lambda thing: thing.rect)


def plural(name: str) -> str:
    """Several of a name: "red circles" of "red circle", "people in red" of "person in red"."""
    noun, preposition, rest = name.partition(" in ")
    words = noun.split()
    words[-1] = PLURALS.get(words[-1], words[-1] + "s")
    return " ".join(words) + preposition + rest


def article(name: str) -> str:
    """The name with its article: "an orange ring", 'the word "KAB"'."""
    if name.startswith("word "):
        return f"the {name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def counted(name: str, count: int) -> str:
    """A name with its number: "a red circle" or "two red circles"."""
    return article(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def joined(parts: Sequence[str]) -> str:
    """A list in words: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _across(a: Rect, b: Rect) -> tuple[int, int]:
    (ax, ay), (bx, by) = a.twice_centre, b.twice_centre
    return bx - ax, by - ay


def is_left_of(a: Rect, b: Rect) -> bool:
    """Whether ``a`` ends before ``b`` begins and lies more to the side than above or below."""
    dx, dy = _across(a, b)
    return a.x2 <= b.x1 and dx >= abs(dy)


def is_above(a: Rect, b: Rect) -> bool:
    """Whether ``a`` ends before ``b`` begins, downwards, and lies more above than to the side."""
    dx, dy = _across(a, b)
    return a.y2 <= b.y1 and dy > abs(dx)


RELATIONS: Mapping[str, Callable[[Rect, Rect], bool]] = {
    "left of": is_left_of,
    "right of": lambda a, b: is_left_of(b, a),
    "above": is_above,
    "below": lambda a, b: is_above(b, a),
}


def relation(a: Rect, b: Rect) -> str | None:
    """The relation of ``a`` to ``b``, or None where none is clear; never more than one."""
    return next((name for name, holds in RELATIONS.items() if holds(a, b)), None)


_PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the center", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)


def place(rect: Rect, scene: Scene) -> str:
    """Where a rectangle's middle is, by thirds of the picture: "in the top left"."""
    x, y = rect.twice_centre
    return _PLACES[y * 3 // (2 * scene.height)][x * 3 // (2 * scene.width)]


def unique_names(scene: Scene) -> list[Thing]:
    """Things that no other thing shares its name with, from left to right."""
    everything = things(scene)
    names = [thing.name for thing in everything]
    return [thing for thing in everything if names.count(thing.name) == 1]


def _is_first(target: Thing, others: Sequence[Thing], where: str, margin: int) -> bool:
    edges: Mapping[str, Callable[[Rect], int]] = {
        "leftmost": lambda rect: rect.x1 + rect.x2,
        "rightmost": lambda rect: -rect.x1 - rect.x2,
        "topmost": lambda rect: rect.y1 + rect.y2,
        "bottommost": lambda rect: -rect.y1 - rect.y2,
    }
    edge = edges[where]
    return all(edge(target.rect) + 2 * margin <= edge(other.rect) for other in others)


def referring_phrases(scene: Scene, target: Thing) -> list[str]:
    """Phrases that mean ``target`` and nothing else in the scene, the plainest first."""
    margin = MARGIN * max(1, min(scene.width, scene.height) // 128)
    everything = [thing for thing in things(scene) if thing.source is not target.source]
    same_noun = [thing for thing in everything if thing.noun == target.noun]
    same_name = [thing for thing in same_noun if thing.name == target.name]
    phrases = []
    if not same_name:
        phrases.append(f"the {target.name}")
    if not same_noun and target.noun != "word":
        phrases.append(f"the {target.noun}")
    if isinstance(target.source, Shape):
        size = target.source.size
        if not any(isinstance(other.source, Shape) and other.source.size == size for other in same_name):
            phrases.append(f"the {name_shape(target.source, with_size=True)}")
    if same_noun:
        group, name = (same_name, target.name) if same_name else (same_noun, target.noun)
        phrases += [
            f"the {where} {name}"
            for where in ("leftmost", "rightmost", "topmost", "bottommost")
            if _is_first(target, group, where, margin) and (same_name or target.noun != "word")
        ]
        for anchor in unique_names(scene):
            found = None if anchor.source is target.source else relation(target.rect, anchor.rect)
            if found and not any(relation(other.rect, anchor.rect) == found for other in same_noun):
                phrases.append(f"the {target.noun} {found} the {anchor.name}")
    return phrases
