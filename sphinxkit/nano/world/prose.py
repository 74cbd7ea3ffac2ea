"""Text without a picture, for joint training: short English paragraphs about things, numbers, people and letters."""

from __future__ import annotations

from collections.abc import Callable

from sphinxkit.data.permutation import derive_key
from sphinxkit.nano.world.composition import draw_pair
from sphinxkit.nano.world.draws import Draws
from sphinxkit.nano.world.phrases import NUMBERS, article, counted, plural
from sphinxkit.nano.world.splits import split_of
from sphinxkit.nano.world.words import draw_word

PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kim", "Leo", "Mara", "Nils")
PLACES = ("garden", "kitchen", "school", "market", "station", "library", "park", "street")
TIMES = ("In the morning", "At noon", "In the evening", "On Monday", "On Friday", "Last week", "Today", "Every day")
THINGS = ("apple", "book", "cup", "ball", "key", "hat", "coin", "letter", "stone", "box")
WEATHER = ("sunny", "cold", "windy", "rainy", "warm", "quiet")
LESS_THAN = (("bigger", "smaller"), ("older", "younger"), ("heavier", "lighter"), ("faster", "slower"))
DIRECTIONS = (("left of", "right of"), ("right of", "left of"), ("above", "below"), ("below", "above"))


def _name(draws: Draws, held_out: bool) -> str:
    color, shape = draw_pair(draws, held_out)
    return f"{color} {shape}"


def _story(draws: Draws, held_out: bool) -> str:
    who, other = draws.shuffled(PEOPLE)[:2]
    thing = draws.choice(THINGS)
    has, gives = draws.between(3, 9), draws.between(1, 2)
    left = has - gives
    return (
        f"{draws.choice(TIMES)} {who} went to the {draws.choice(PLACES)}. It was {draws.choice(WEATHER)}. "
        f"{who} had {NUMBERS[has]} {plural(thing)} and gave {NUMBERS[gives]} to {other}. "
        f"Now {who} has {NUMBERS[left]} {thing if left == 1 else plural(thing)}."
    )


def _comparison(draws: Draws, held_out: bool) -> str:
    first, second, third = draws.shuffled(PEOPLE)[:3]
    more, less = draws.choice(LESS_THAN)
    return (
        f"{first} is {more} than {second}. {second} is {more} than {third}. "
        f"So {third} is {less} than {first}, and {first} is the {more[:-1]}st of the three."
    )


def _sum(draws: Draws, held_out: bool) -> str:
    a, b = draws.between(1, 20), draws.between(1, 20)
    low, high = sorted((a, b))
    ending = f"{high} is more than {low}" if low != high else f"{a} and {b} are the same"
    return f"{a} plus {b} is {a + b}. {a + b} minus {b} is {a}. {ending[0].upper()}{ending[1:]}."


def _spelling(draws: Draws, held_out: bool) -> str:
    word = draw_word(draws, held_out, numerals=False)
    return (
        f'The word "{word}" is spelled {" ".join(word)}. It has {NUMBERS[len(word)]} letters and begins with {word[0]}.'
    )


def _places(draws: Draws, held_out: bool) -> str:
    first, second = _name(draws, held_out), _name(draws, False)
    one, other = draws.choice(DIRECTIONS)
    return (
        f"{article(first).capitalize()} is {one} {article(second)}. "
        f"So the {second} is {other} the {first}. There are two things."
    )


def _counting(draws: Draws, held_out: bool) -> str:
    name = _name(draws, held_out)
    count, more = draws.between(2, 5), draws.between(1, 3)
    total = counted(name, count + more)
    return f"There are {counted(name, count)}. We add {NUMBERS[more]} more. Now there are {total}."


def _sequence(draws: Draws, held_out: bool) -> str:
    start, step = draws.between(0, 30), draws.between(1, 5)
    numbers = [start + step * index for index in range(6)]
    return f"Counting by {step} from {start}: {', '.join(map(str, numbers))}. The next number is {numbers[-1] + step}."


MAKERS: tuple[Callable[[Draws, bool], str], ...] = (
    _story,
    _comparison,
    _sum,
    _spelling,
    _places,
    _counting,
    _sequence,
)
LEAST, MOST = 1, 3  # paragraphs


def prose(draws: Draws, split: str) -> str:
    """Text of a split, to which each paragraph belongs by its hash. Words and pairs of ``test`` are held out.

    Args:
        draws: Random choices.
        split: ``train``, ``val`` or ``test``.
    """
    paragraphs: list[str] = []
    for _ in range(draws.between(LEAST, MOST)):
        make = draws.choice(MAKERS)
        while split_of(derive_key("prose", text := make(draws, split == "test"))) != split:
            pass
        paragraphs.append(text)
    return "\n".join(paragraphs)
