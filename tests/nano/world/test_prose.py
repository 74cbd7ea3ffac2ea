from __future__ import annotations

import re
from itertools import pairwise

import pytest

from sphinxkit.nano.world import World
from sphinxkit.nano.world.phrases import NUMBERS
from sphinxkit.nano.world.splits import is_held_out_word

NUM_TEXTS = 300


def texts(split: str = "train") -> list[str]:
    world = World(split=split)
    return [world.text(index) for index in range(NUM_TEXTS)]


def test_texts_vary() -> None:
    found = texts()
    assert len(set(found)) > 0.95 * NUM_TEXTS
    assert {text.count("\n") for text in found} == {0, 1, 2}
    assert not {line for text in found for line in text.split("\n")} & {
        line for text in texts("test") for line in text.split("\n")
    }


def test_what_they_say_is_true() -> None:
    checked = 0
    for line in (line for text in texts() for line in text.split("\n")):
        if match := re.match(r"(\d+) plus (\d+) is (\d+)\. (\d+) minus (\d+) is (\d+)\.", line):
            a, b, total, again, less, left = map(int, match.groups())
            assert (a + b, total, again - less) == (total, again, left)
        elif match := re.match(
            r'The word "(\w+)" is spelled ([\w ]+)\. It has (\w+) letters and begins with (\w)', line
        ):
            word, spelled, count, first = match.groups()
            assert spelled.replace(" ", "") == word
            assert (NUMBERS[len(word)], word[0]) == (count, first)
        elif match := re.search(r"had (\w+) \w+ and gave (\w+) to .* Now \w+ has (\w+) ", line):
            had, gave, left_over = (NUMBERS.index(word) for word in match.groups())
            assert had - gave == left_over
        elif match := re.match(r"There are (\w+) (.*)\. We add (\w+) more\. Now there are (\w+) \2\.", line):
            first, more, both = (NUMBERS.index(match[group]) for group in (1, 3, 4))
            assert first + more == both
        elif match := re.match(r"Counting by (\d+) from .*: (.*)\. The next number is (\d+)\.", line):
            numbers = [int(number) for number in match[2].split(", ")] + [int(match[3])]
            assert {b - a for a, b in pairwise(numbers)} == {int(match[1])}
        else:
            assert re.match(r"\w+ is \w+er than |An? \w+ \w+ is (left of|right of|above|below) ", line), line
            continue
        checked += 1
    assert checked > NUM_TEXTS / 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_lookups_say_the_letter_of_each_choice(split: str) -> None:
    text = World(split=split, has_lookups=True).text(0)
    lists = [part.split("Choices:") for part in re.split(r"(?<=\n)(?=The answer is \S+\.\nChoices)", text)]
    assert len(lists) == 6
    for told, rest in lists:
        letters = {word: letter for letter, word in re.findall(r"^([A-D])\. (\S+)$", rest, re.MULTILINE)}
        assert all(is_held_out_word(word) == (split == "test") for word in letters)
        answers = re.findall(r"The answer is (\S+)\.", told + rest)
        assert sorted(answers) == sorted(letters)
        assert re.findall(r"^([A-D])$", rest, re.MULTILINE) == [letters[word] for word in answers]
    assert World(split=split).text(0) != text
