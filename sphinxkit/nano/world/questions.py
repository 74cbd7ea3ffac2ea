"""Questions about a scene, each with its answer and wrong answers to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sphinxkit.nano.world.composition import SIZES, draw_pair
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.phrases import (
    RELATIONS,
    plural,
    referring_phrases,
    relation,
    things,
    unique_names,
)
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Person, Scene, Shape
from sphinxkit.nano.world.shapes import SHAPES
from sphinxkit.nano.world.splits import is_held_out_pair
from sphinxkit.nano.world.words import draw_word

YES_NO = ("yes", "no")
COUNTS = tuple(str(count) for count in range(11))


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question.

    Args:
        text: The question's words.
        answer: A word, a numeral or a few words.
        others: Wrong answers of the same kind.
    """

    text: str
    answer: str
    others: tuple[str, ...]


def _ask(text: str, answer: str, options: Sequence[str]) -> SceneQuestion:
    return SceneQuestion(text, answer, tuple(option for option in dict.fromkeys(options) if option != answer))


def _yes_no(text: str, is_so: bool) -> SceneQuestion:
    return _ask(text, YES_NO[not is_so], YES_NO)


def _is_askable(shape: Shape, scene: Scene) -> bool:
    return scene.split != "test" or is_held_out_pair(shape.color, shape.shape)


def _about_one(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    """Colour, shape and size of one shape."""
    shapes = scene.shapes
    askable = [shape for shape in shapes if _is_askable(shape, scene)]
    found = []
    names, nouns = [x.color for x in shapes], [x.shape for x in shapes]
    by_shape = [x for x in askable if nouns.count(x.shape) == 1]
    if by_shape:
        shape = rng.choice(by_shape)
        found.append(_ask(f"What color is the {shape.shape}?", shape.color, tuple(COLORS)))
    by_color = [x for x in askable if names.count(x.color) == 1]
    if by_color:
        shape = rng.choice(by_color)
        found.append(_ask(f"What shape is {shape.color}?", shape.shape, SHAPES))
    pairs = [(x.color, x.shape) for x in shapes]
    by_pair = [x for x in askable if pairs.count((x.color, x.shape)) == 1]
    if by_pair:
        shape = rng.choice(by_pair)
        sizes = tuple(size for size in SIZES if size != "tiny")
        found.append(_ask(f"What size is the {shape.color} {shape.shape}?", shape.size, sizes))
    return found


def _about_count(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    shapes = scene.shapes
    total = str(len(shapes))
    found = [_ask("How many shapes are there?", total, COUNTS[1:7])]
    shape = rng.choice(shapes)
    color = shape.color if rng.chance(80) else rng.choice(tuple(COLORS))
    noun = shape.shape if rng.chance(80) else rng.choice(SHAPES)
    found.append(_ask(f"How many {color} shapes are there?", str([x.color for x in shapes].count(color)), COUNTS[:5]))
    found.append(_ask(f"How many {plural(noun)} are there?", str([x.shape for x in shapes].count(noun)), COUNTS[:5]))
    return found


def _about_presence(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    """Yes and no in equal parts; a "no" differs from something that is there in one word where that is possible."""
    pairs = {(x.color, x.shape) for x in scene.shapes}
    shape = next(x for x in rng.shuffled(scene.shapes) if _is_askable(x, scene))
    color, noun = shape.color, shape.shape
    is_there = rng.chance(50)
    if not is_there:
        for _ in range(16):
            near = (rng.choice(tuple(COLORS)), noun) if rng.chance(50) else (color, rng.choice(SHAPES))
            if near not in pairs and near in _allowed(scene):
                break
        else:
            near = draw_pair(rng, scene.split == "test")
        color, noun = near
    article = "an" if color[0] in "aeiou" else "a"
    return [_yes_no(f"Is there {article} {color} {noun}?", (color, noun) in pairs)]


def _allowed(scene: Scene) -> set[tuple[str, str]]:
    """The pairs that questions of the scene's split may name."""
    is_test = scene.split == "test"
    return {(color, shape) for color in COLORS for shape in SHAPES if is_test or not is_held_out_pair(color, shape)}


def _about_place(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    """Relations of two things, and which is the leftmost."""
    named = unique_names(scene)
    targets = [x for x in named if scene.split != "test" or x.is_held_out]
    if not targets or len(named) < 2:
        return []
    first = rng.choice(targets)
    second = rng.choice([x for x in named if x is not first])
    between = relation(first.rect, second.rect)
    if between is None:
        return []
    found = [_ask(f"Where is the {first.name} relative to the {second.name}?", between, tuple(RELATIONS))]
    is_so = rng.chance(50)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[between]
    found.append(_yes_no(f"Is the {first.name} {between if is_so else opposite} the {second.name}?", is_so))
    return found


def _about_words(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    texts = [word.text for word in scene.words]
    others = [*texts, *(draw_word(rng, scene.split == "test") for _ in range(3))]
    found = []
    if len(texts) == 1:
        found.append(_ask("What is written in the image?", texts[0], others))
    else:
        found.append(_ask("How many words are there?", str(len(texts)), COUNTS[1:5]))
        if scene.words[0].rect.y2 <= scene.words[1].rect.y1:
            found.append(_ask("What does the topmost word say?", texts[0], others))
    signs = [word for word in scene.words if word.panel is not None]
    colors = [word.panel[1] for word in signs if word.panel is not None]
    for word in signs:
        if word.panel is not None and colors.count(word.panel[1]) == 1:
            found.append(_ask(f"What is written on the {word.panel[1]} sign?", word.text, others))
            found.append(_ask(f'What color is the sign with "{word.text}"?', word.panel[1], tuple(COLORS)))
            break
    return found


def _about_people(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    found = [_ask("How many people are there?", str(len(scene.people)), COUNTS[1:5])]
    persons = [x for x in things(scene) if isinstance(x.source, Person)]
    target = rng.choice(persons)
    phrases = [p for p in referring_phrases(scene, target) if " in " not in p or len(persons) > 1]
    person = target.source
    if phrases and isinstance(person, Person):
        if phrases[0] == "the person":
            found.append(_ask("What color are the person's clothes?", person.color, tuple(COLORS)))
        side = rng.choice(("left", "right"))
        found.append(_yes_no(f"Does {phrases[0]} raise the {side} arm?", side in person.raised))
        found.append(_yes_no(f"Does {phrases[0]} face the viewer?", person.pose.facing == "front"))
    return found


def _about_page(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    kinds = [block.kind for block in scene.blocks]
    kind = rng.choice(("table", "figure", "list", "title"))
    found = [
        _ask("How many columns does the page have?", str(len(scene.columns)), COUNTS[1:4]),
        _yes_no(f"Does the page have a {kind}?", kind in kinds),
        _ask("How many figures are on the page?", str(kinds.count("figure")), COUNTS[:5]),
    ]
    titles = [block for block in scene.blocks if block.kind == "title"]
    if titles:
        others = [draw_word(rng, scene.split == "test", numerals=False) for _ in range(3)]
        found.append(_ask("What is the title of the page?", " ".join(titles[0].text), others))
    return found


def _about_chart(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    if scene.chart is None:
        return []
    bars = scene.chart.bars
    bar = rng.choice(bars)
    labels, values = [x.label for x in bars], [str(x.value) for x in bars]
    near = [str(max(1, bar.value + change)) for change in (1, -1, 2, 3)]
    return [
        _ask(f"What is the value of {bar.label}?", str(bar.value), [*values, *near]),
        _ask("Which bar is the longest?", max(bars, key=lambda x: x.value).label, labels),
        _ask("Which bar is the shortest?", min(bars, key=lambda x: x.value).label, labels),
        _ask(f"What is the label of the {bar.color} bar?", bar.label, labels),
        _ask(f"What color is the bar of {bar.label}?", bar.color, tuple(COLORS)),
        _ask("How many bars are there?", str(len(bars)), COUNTS[2:6]),
    ]


def questions(scene: Scene, rng: Rng) -> list[SceneQuestion]:
    """Questions of every kind that the scene can answer, in random order.

    Args:
        scene: The scene.
        rng: Random choices of the questions.
    """
    makers: list[tuple[bool, Callable[[Scene, Rng], list[SceneQuestion]]]] = [
        (bool(scene.shapes), _about_one),
        (bool(scene.shapes), _about_count),
        (bool(scene.shapes), _about_presence),
        (True, _about_place),
        (bool(scene.words), _about_words),
        (bool(scene.people), _about_people),
        (bool(scene.columns), _about_page),
        (scene.chart is not None, _about_chart),
    ]
    return rng.shuffled([question for applies, make in makers if applies for question in make(scene, rng)])


def unanswerable(scene: Scene, rng: Rng) -> SceneQuestion | None:
    """A question about a shape that is not there; None for scenes that could not be thought to have any."""
    absent = [shape for shape in SHAPES if shape not in [x.shape for x in scene.shapes]]
    if not scene.shapes or not absent:
        return None
    return _ask(f"What color is the {rng.choice(absent)}?", "Unanswerable", tuple(COLORS))
