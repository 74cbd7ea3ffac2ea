from __future__ import annotations

import re
from collections import Counter

import pytest

from sphinxkit.nano.world import COLORS, SHAPES, Rng, Scene, World
from sphinxkit.nano.world.phrases import RELATIONS, plural, things
from sphinxkit.nano.world.questions import SceneQuestion, questions, unanswerable

NUM_SCENES = 80
KINDS = ("single", "shapes", "texts", "people", "mixed", "page", "chart")
SINGULAR = {plural(shape): shape for shape in SHAPES}
# "yes" and "no" are drawn with a coin; of some hundred answers neither may be rarer than this.
LEAST_SHARE = 0.35


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def answer(text: str, scene: Scene) -> str | None:
    """The answer, worked out anew from the question's words; None for a question about a referring phrase."""
    shapes, words, people, blocks = scene.shapes, scene.words, scene.people, scene.blocks
    bars = scene.chart.bars if scene.chart else ()
    named = {thing.name: thing.rect for thing in things(scene)}
    patterns = {
        r"What color is the (\w+)\?": lambda m: [x.color for x in shapes if x.shape == m[1]],
        r"What shape is (\w+)\?": lambda m: [x.shape for x in shapes if x.color == m[1]],
        r"What size is the (\w+) (\w+)\?": lambda m: [x.size for x in shapes if (x.color, x.shape) == (m[1], m[2])],
        r"How many shapes are there\?": lambda m: [str(len(shapes))],
        r"How many words are there\?": lambda m: [str(len(words))],
        r"How many people are there\?": lambda m: [str(len(people))],
        r"How many bars are there\?": lambda m: [str(len(bars))],
        r"How many (\w+) shapes are there\?": lambda m: [str(sum(x.color == m[1] for x in shapes))],
        r"How many (\w+) are there\?": lambda m: [str(sum(x.shape == SINGULAR[m[1]] for x in shapes))],
        r"Is there an? (\w+) (\w+)\?": lambda m: [yes(any((x.color, x.shape) == (m[1], m[2]) for x in shapes))],
        r"Where is the (.+) relative to the (.+)\?": lambda m: [
            name for name, holds in RELATIONS.items() if holds(named[m[1]], named[m[2]])
        ],
        r"Is the (.+) (left of|right of|above|below) the (.+)\?": lambda m: [
            yes(RELATIONS[m[2]](named[m[1]], named[m[3]]))
        ],
        r"What is written in the image\?": lambda m: [word.text for word in words],
        r"What does the topmost word say\?": lambda m: [min(words, key=lambda word: word.rect.y1).text],
        r"What is written on the (\w+) sign\?": lambda m: [x.text for x in words if x.panel and x.panel[1] == m[1]],
        r'What color is the sign with "(\w+)"\?': lambda m: [x.panel[1] for x in words if x.panel and x.text == m[1]],
        r"What color are the person's clothes\?": lambda m: [person.color for person in people],
        r"How many columns does the page have\?": lambda m: [str(len(scene.columns))],
        r"Does the page have a (\w+)\?": lambda m: [yes(any(block.kind == m[1] for block in blocks))],
        r"How many figures are on the page\?": lambda m: [str(sum(block.kind == "figure" for block in blocks))],
        r"What is the title of the page\?": lambda m: [" ".join(b.text) for b in blocks if b.kind == "title"],
        r"What is the value of (\w+)\?": lambda m: [str(bar.value) for bar in bars if bar.label == m[1]],
        r"Which bar is the longest\?": lambda m: [max((bar.value, bar.label) for bar in bars)[1]],
        r"Which bar is the shortest\?": lambda m: [min((bar.value, bar.label) for bar in bars)[1]],
        r"What is the label of the (\w+) bar\?": lambda m: [bar.label for bar in bars if bar.color == m[1]],
        r"What color is the bar of (\w+)\?": lambda m: [bar.color for bar in bars if bar.label == m[1]],
        r"Does the person raise the (\w+) arm\?": lambda m: [yes(m[1] in people[0].raised)],
        r"Does the person face the viewer\?": lambda m: [yes(people[0].pose.facing == "front")],
    }
    for pattern, solve in patterns.items():
        if match := re.fullmatch(pattern, text):
            answers = solve(match)
            assert len(answers) == 1, (text, answers)
            return str(answers[0])
    assert re.fullmatch(r"Does the .*person.* (raise the (left|right) arm|face the viewer)\?", text), text
    return None


def asked(kind: str, split: str = "train") -> list[tuple[Scene, SceneQuestion]]:
    world = World(split=split)
    scenes = [world.scene_of_kind(index, kind) for index in range(NUM_SCENES)]
    return [(scene, question) for index, scene in enumerate(scenes) for question in questions(scene, Rng(index))]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str, split: str) -> None:
    found = asked(kind, split)
    assert len(found) > NUM_SCENES
    for scene, question in found:
        expected = answer(question.text, scene)
        assert expected in (None, question.answer), question
        assert question.answer not in question.others
        assert len(set(question.others)) == len(question.others)


def test_yes_and_no_are_balanced() -> None:
    for start in ("Is there", "Is the"):
        counts = Counter(question.answer for _, question in asked("shapes") if question.text.startswith(start))
        assert min(counts["yes"], counts["no"]) > LEAST_SHARE * counts.total() > 10


def test_a_persons_arms_and_face() -> None:
    for scene, question in asked("people"):
        if match := re.fullmatch(r"Does the person in (\w+) raise the (\w+) arm\?", question.text):
            (person,) = (person for person in scene.people if person.color == match[1])
            assert question.answer == yes(match[2] in person.raised)


def test_unanswerable_questions_are_about_what_is_absent() -> None:
    for index in range(NUM_SCENES):
        scene = World().scene_of_kind(index, "shapes")
        question = unanswerable(scene, Rng(index))
        assert question is not None
        noun = question.text.split()[-1].rstrip("?")
        assert noun not in [shape.shape for shape in scene.shapes]
        assert question.answer == "Unanswerable"
        assert set(question.others) == set(COLORS)
    assert unanswerable(World().scene_of_kind(0, "texts"), Rng(0)) is None
