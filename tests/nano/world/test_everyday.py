"""Questions in everyday words: other words, the same answer."""

from __future__ import annotations

import re

import pytest

from sphinxkit.errors import DataError
from sphinxkit.nano.world import KINDS_OF_TASK, Rng, World
from sphinxkit.nano.world.everyday import WORDINGS, everyday, paraphrase


@pytest.mark.parametrize("task", KINDS_OF_TASK)
def test_the_answer_is_the_same(task: str) -> None:
    plain, other = World(size=128), World(size=128, everyday_percent=100)
    asked = set()
    for index in range(20):
        (_, told), (_, again) = plain.conversation(index, task), other.conversation(index, task)
        assert again[1] == told[1]
        assert "{" not in again[0]["content"]
        asked.add(again[0]["content"] == told[0]["content"])
    assert (False in asked) == (task in WORDINGS)  # VizWiz has none


def test_everyday_questions_are_mixed_in() -> None:
    world = World(size=128, everyday_percent=50)
    asked = [world.conversation(index, "caption")[1][0]["content"] for index in range(60)]
    everyday_ones = sum(question in WORDINGS["caption"] for question in asked)
    assert 15 < everyday_ones < 45


def choices(question: str) -> dict[str, str]:
    """Letter to choice."""
    return dict(re.findall(r"^([A-D])\. (.+)$", question, re.MULTILINE))


def test_further_rounds_ask_the_same_scene_with_other_orders_of_choices() -> None:
    one, three = World(size=128), World(size=128, rounds=3)
    moved = 0
    for index in range(10):
        (_, first), (_, more) = (world.conversation(index, "multiple_choice", 99) for world in (one, three))
        assert more[: len(first)] == first
        assert 2 * len(first) < len(more) <= 4 * len(first)
        answers: dict[str, set[str]] = {}
        for asked, told in zip(more[::2], more[1::2], strict=True):
            question = asked["content"].splitlines()[1]
            answers.setdefault(question, set()).add(choices(asked["content"])[told["content"]])
            moved += asked not in first
        assert all(len(found) == 1 for found in answers.values())  # the same answer, whatever its letter
    assert moved > 20


def test_choices_come_after_the_answer_that_is_told_first() -> None:
    world = World(size=128, told_first_percent=100)
    for index in range(10):
        _, messages = world.conversation(index, "multiple_choice", 3)
        assert len(messages) % 4 == 0
        for plain, answer, asked, letter in zip(*(messages[k::4] for k in range(4)), strict=True):
            assert plain["content"].splitlines()[0] == asked["content"].splitlines()[1]
            assert choices(asked["content"])[letter["content"]] == answer["content"]


def test_the_context_says_the_answer_and_the_question_stays_the_same() -> None:
    plain, told = World(size=128), World(size=128, context_percent=100)
    for index in range(10):
        (_, asked), (_, with_context) = (world.conversation(index, "multiple_choice", 3) for world in (plain, told))
        for question, letter, longer, same in zip(
            asked[::2], asked[1::2], with_context[::2], with_context[1::2], strict=True
        ):
            answer = choices(question["content"])[letter["content"]]
            assert longer["content"] == f"Context:\nThe answer is {answer}.\n{question['content']}"
            assert same == letter
    assert told.conversation(0, "vqa") == plain.conversation(0, "vqa")


@pytest.mark.parametrize("task", ["vqa", "multiple_choice"])
def test_only_questions_that_begin_so(task: str) -> None:
    starts = ("What is written", "Which bar")
    world = World(size=128, split="test", question_starts=starts, rounds=2)
    kinds = set()
    for index in range(20):
        samples = world.samples(index, task)
        assert all(sample.question.startswith(starts) for sample in samples)
        kinds.update(sample.question[:8] for sample in samples)
    assert kinds == {"What is ", "Which ba"}
    assert World(question_starts=starts).samples(0, "rec") == World().samples(0, "rec")
    with pytest.raises(DataError, match="no sample of task 'vqa' in 200 scenes"):
        World(question_starts=["Who"]).samples(0, "vqa")


@pytest.mark.parametrize("num_letters", [1, 2])
def test_choices_are_cut_and_those_then_alike_left_out(num_letters: int) -> None:
    starts = ("What does the topmost", "What is the value")
    whole, cut = (World(size=128, question_starts=starts, choice_letters=given) for given in (None, num_letters))
    counts = set()
    for index in range(20):
        (_, (asked, letter)), (_, (shorter, other)) = (w.conversation(index, "multiple_choice") for w in (whole, cut))
        beginnings = [choice[:num_letters] for choice in choices(asked["content"]).values()]
        assert list(choices(shorter["content"]).values()) == list(dict.fromkeys(beginnings))
        answer = choices(asked["content"])[letter["content"]]
        assert choices(shorter["content"])[other["content"]] == answer[:num_letters]
        counts.add(len(beginnings) - len(choices(shorter["content"])))
    assert min(counts) == 0
    assert (max(counts) > 0) == (num_letters == 1)
    assert cut.conversation(0, "rec") == World(size=128).conversation(0, "rec")


def test_paraphrases_keep_what_is_asked_about() -> None:
    found = {paraphrase("What color is the ring?", Rng("test", index)) for index in range(60)}
    assert {"What color is the ring?", "What colour is the ring?", "Which color does the ring have?"} <= found
    assert all("the ring" in question for question in found)
    assert {paraphrase("Is it late?", Rng(index)) for index in range(5)} == {"Is it late?"}


def test_categories_are_in_the_plural_and_the_sample_keeps_its_name() -> None:
    world = World(size=128)
    sample = next(
        sample for index in range(50) for sample in world.samples(index, "detection") if sample.category == "cross"
    )
    found = everyday("detection", sample, Rng("test"))
    assert found is not None
    assert "crosses" in found[0]
    assert found[1] is sample


def test_regions_are_in_the_words() -> None:
    assert all("{box}" in words for words in (*WORDINGS["reg"], *WORDINGS["pose"]))
    world = World(size=(448, 300), everyday_percent=100, point_grid=128)
    question = world.conversation(0, "reg")[1][0]["content"]
    numbers = re.findall(r"\d\.\d{3}", question)
    assert len(numbers) == 4
    assert set(numbers) <= {f"{step / 128:.3f}" for step in range(129)}
