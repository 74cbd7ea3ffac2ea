"""Text without a picture, for joint training: short English paragraphs about things, numbers, people and letters."""

from __future__ import annotations

from collections.abc import Callable

from sphinxkit.data.permutation import derive_key
from sphinxkit.nano.world.composition import draw_pair
from sphinxkit.nano.world.phrases import NUMBERS, article, counted, plural
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.splits import split_of
from sphinxkit.nano.world.words import draw_word

PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kim", "Leo", "Mara", "Nils")
PLACES = ("garden", "kitchen", "school", "market", "station", "library", "park", "street")
TIMES = ("In the morning", "At noon", "In the evening", "On Monday", "On Friday", "Last week", "Today", "Every day")
THINGS = ("apple", "book", "cup", "ball", "key", "hat", "coin", "letter", "stone", "box")
WEATHER = ("sunny", "cold", "windy", "rainy", "warm", "quiet")
LESS_THAN = (("bigger", "smaller"), ("older", "younger"), ("heavier", "lighter"), ("faster", "slower"))
DIRECTIONS = (("left of", "right of"), ("right of", "left of"), ("above", "below"), ("below", "above"))


def _name(rng: Rng, held_out: bool) -> str:
    color, shape = draw_pair(rng, held_out)
    return f"{color} {shape}"


def _story(rng: Rng, held_out: bool) -> str:
    who, other = rng.shuffled(PEOPLE)[:2]
    thing = rng.choice(THINGS)
    has, gives = rng.between(3, 9), rng.between(1, 2)
    left = has - gives
    return (
        f"{rng.choice(TIMES)} {who} went to the {rng.choice(PLACES)}. It was {rng.choice(WEATHER)}. "
        f"{who} had {NUMBERS[has]} {plural(thing)} and gave {NUMBERS[gives]} to {other}. "
        f"Now {who} has {NUMBERS[left]} {thing if left == 1 else plural(thing)}."
    )


def _comparison(rng: Rng, held_out: bool) -> str:
    first, second, third = rng.shuffled(PEOPLE)[:3]
    more, less = rng.choice(LESS_THAN)
    return (
        f"{first} is {more} than {second}. {second} is {more} than {third}. "
        f"So {third} is {less} than {first}, and {first} is the {more[:-1]}st of the three."
    )


def _sum(rng: Rng, held_out: bool) -> str:
    a, b = rng.between(1, 20), rng.between(1, 20)
    low, high = sorted((a, b))
    ending = f"{high} is more than {low}" if low != high else f"{a} and {b} are the same"
    return f"{a} plus {b} is {a + b}. {a + b} minus {b} is {a}. {ending[0].upper()}{ending[1:]}."


def _spelling(rng: Rng, held_out: bool) -> str:
    word = draw_word(rng, held_out, numerals=False)
    return (
        f'The word "{word}" is spelled {" ".join(word)}. It has {NUMBERS[len(word)]} letters and begins with {word[0]}.'
    )


def _places(rng: Rng, held_out: bool) -> str:
    first, second = _name(rng, held_out), _name(rng, False)
    one, other = rng.choice(DIRECTIONS)
    return (
        f"{article(first).capitalize()} is {one} {article(second)}. "
        f"So the {second} is {other} the {first}. There are two things."
    )


def _counting(rng: Rng, held_out: bool) -> str:
    name = _name(rng, held_out)
    count, more = rng.between(2, 5), rng.between(1, 3)
    total = counted(name, count + more)
    return f"There are {counted(name, count)}. We add {NUMBERS[more]} more. Now there are {total}."


def _sequence(rng: Rng, held_out: bool) -> str:
    start, step = rng.between(0, 30), rng.between(1, 5)
    numbers = [start + step * index for index in range(6)]
    return f"Counting by {step} from {start}: {', '.join(map(str, numbers))}. The next number is {numbers[-1] + step}."


MAKERS: tuple[Callable[[Rng, bool], str], ...] = (
    _story,
    _comparison,
    _sum,
    _spelling,
    _places,
    _counting,
    _sequence,
)
LEAST, MOST = 1, 3  # paragraphs


def prose(rng: Rng, split: str) -> str:
    """Text of a split, to which each paragraph belongs by its hash. Words and pairs of ``test`` are held out.

    Args:
        rng: Random choices.
        split: ``train``, ``val`` or ``test``.
    """
    paragraphs: list[str] = []
    for _ in range(rng.between(LEAST, MOST)):
        make = rng.choice(MAKERS)
        while split_of(derive_key("prose", text := make(rng, split == "test"))) != split:
            pass
        paragraphs.append(text)
    return "\n".join(paragraphs)


NUM_LISTS = 6


def lookups(rng: Rng, split: str) -> str:
    """Lists of choices, and what letter each choice has: an exercise for multiple choice with words that are spelled.

    Args:
        rng: Random choices.
        split: ``train``, ``val`` or ``test``; words of ``test`` are held out.
    """
    lines: list[str] = []
    for _ in range(NUM_LISTS):
        choices = [(letter, draw_word(rng, split == "test")) for letter in "ABCD"]
        (first, told), *others = rng.shuffled(choices)
        lines += [f"The answer is {told}.", "Choices:", *(f"{letter}. {word}" for letter, word in choices), first]
        lines += [line for letter, word in others for line in (f"The answer is {word}.", letter)]
    return "\n".join(lines)
