from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.data.conversations import read_conversation, read_sample
from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.nano.world import (
    COLORS,
    KINDS_OF_TASK,
    SHAPES,
    TASKS,
    Scene,
    World,
    WorldMixture,
    is_held_out_pair,
    is_held_out_word,
)


@pytest.mark.parametrize("task", TASKS)
def test_everything_depends_on_arguments_and_number_alone(task: str) -> None:
    first, again = World("real", seed=3), World("real", seed=3)
    later = [first.record(index, task, 3) for index in (5, 0, 9)]
    assert [again.record(index, task, 3) for index in (9, 5, 0)] == [later[2], later[0], later[1]]


def test_other_arguments_other_scenes() -> None:
    worlds = [World(), World(seed=1), World("real"), World(split="val"), World(max_objects=3)]
    hashes = [[world.scene_of_kind(index, "shapes").content_hash for index in range(20)] for world in worlds]
    assert len({number for found in hashes[:4] for number in found}) == 80
    assert hashes[0] != hashes[4]


@pytest.mark.parametrize("task", TASKS)
def test_records_are_conversations(task: str) -> None:
    world = World(size=(96, 64))
    for index in range(5):
        record = world.record(index, task, num_turns=4)
        sample = read_sample(record, record["id"], "here:1", Path("/data"))
        assert sample.task == task
        if task == "text":
            assert sample.type == "text"
            assert sample.text == world.text(index)
            continue
        assert sample.image == Path(f"/data/images/{record['id']}.png")
        messages = read_conversation(record, "here:1")
        samples = world.samples(index, task)[:4]
        assert len(messages) == 2 * len(samples)
        for question, answer, expected in zip(messages[::2], messages[1::2], samples, strict=True):
            example = tasks.create(task).format(expected)
            assert question["content"].removeprefix("<image>\n") == example.instruction
            assert answer["content"] == example.answer


def test_wordings_vary_only_where_asked_for() -> None:
    def instructions(world: World) -> set[str]:
        return {world.conversation(index, "caption")[1][0]["content"] for index in range(40)}

    assert instructions(World()) == {tasks.Caption.wordings[0]}
    assert instructions(World(has_all_wordings=True)) == set(tasks.Caption.wordings)


@pytest.mark.parametrize("size", [64, 128, (128, 96), (96, 128)])
def test_key_points_are_told_on_a_grid_where_asked_for(size: int | tuple[int, int]) -> None:
    """On 64 pixels the grid of 128 has every pixel's middle; on 128 it has every pixel's edge, half a pixel off."""
    exact, coarse = World(size=size), World(size=size, point_grid=128)
    on_grid = {f"{step / 128:.3f}" for step in range(129)}
    for index in range(20):
        scene, (asked, told) = exact.conversation(index, "pose")
        assert coarse.conversation(index, "pose")[1][0] == asked
        answer = coarse.conversation(index, "pose")[1][1]["content"]
        numbers = re.findall(r"\d\.\d{3}", answer)
        assert len(numbers) >= 24  # of twelve joints at least: those that a back shows
        assert set(numbers) <= on_grid
        true = re.findall(r"\d\.\d{3}", told["content"])
        most = 0.0 if size == 64 else 0.5 / 128 + 0.001
        assert all(0 <= float(b) - float(a) <= most for a, b in zip(numbers, true, strict=True))
        assert (answer == told["content"]) == (size == 64)
        assert scene.geometry.side in (64, 128)


def test_wordings_can_be_replaced() -> None:
    plain, other = World(), World(wordings={"rec": "Where? {phrase}", "caption": "Say."})
    question, answer = other.conversation(2, "rec")[1]
    phrase = plain.samples(2, "rec")[0].phrase
    assert question["content"] == f"Where? {phrase}"
    assert answer == plain.conversation(2, "rec")[1][1]
    assert other.conversation(2, "caption")[1][0]["content"] == "Say."
    assert other.conversation(2, "vqa") == plain.conversation(2, "vqa")
    with pytest.raises(DataError, match="wordings: there is no task 'capton'; did you mean 'caption'"):
        World(wordings={"capton": "Say."})


def test_tasks_share_scenes() -> None:
    world = World()
    for index in range(30):
        rec, reg = world.scene(index, "rec"), world.scene(index, "reg")
        assert rec.kind != reg.kind or rec.content_hash == reg.content_hash


def test_what_does_not_exist() -> None:
    world = World()
    with pytest.raises(DataError, match="no scenes for task 'pse'; did you mean 'pose'"):
        world.scene(0, "pse")
    with pytest.raises(DataError, match="no scenes for task 'text'"):
        world.samples(0, "text")
    with pytest.raises(DataError, match="scenes are numbered from 0, got -1"):
        world.scene(-1)
    with pytest.raises(DataError, match="texts are numbered from 0, got -2"):
        world.text(-2)
    with pytest.raises(DataError, match="point_grid must be at least 1, got 0"):
        World(point_grid=0)
    with pytest.raises(DataError, match="num_turns must be at least 1, got 0"):
        world.record(0, "vqa", 0)


def test_a_style_that_is_too_narrow() -> None:
    world = World(max_objects=1)
    index = next(n for n in range(100) if world._rng("kind", "relation", n).below(8) < 5)
    with pytest.raises(DataError, match="no sample of task 'relation' in 200 scenes"):
        world.samples(index, "relation")


class Recorder(World):
    """Remembers which sample of which task each turn asks about."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked: list[tuple[str, Any]] = []

    def _turn(self, task: str, sample: Any, rng: Any) -> list[dict[str, str]]:
        self.asked.append((task, sample))
        return super()._turn(task, sample, rng)

    def turns(self, index: int, num_turns: int) -> tuple[Scene, list[tuple[str, Any]]]:
        self.asked = []
        scene, messages = self.conversation(index, "all", num_turns)
        assert len(messages) == 2 * len(self.asked)
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(self.asked)
        return scene, self.asked


@pytest.mark.parametrize("size", [64, 128])
def test_conversations_of_all_tasks(size: int) -> None:
    world = Recorder(size=size)
    first, anywhere = set(), Counter()  # type: ignore[var-annotated]
    for index in range(300):
        scene, asked = world.turns(index, 5)
        assert len(asked) == 5
        first.add(asked[0][0])
        anywhere.update(task for task, _ in asked)
        assert all(scene.kind in dict(KINDS_OF_TASK[task]) for task, _ in asked)
        said = [(task, repr(sample)) for task, sample in asked]
        assert len(set(said)) == len(said), said
    assert first == set(KINDS_OF_TASK)
    assert set(anywhere) == set(KINDS_OF_TASK)


@pytest.mark.parametrize("num_turns", [1, 2, 30])
def test_conversations_of_all_tasks_have_as_many_turns_as_there_are(num_turns: int) -> None:
    world = Recorder()
    counts = {len(world.turns(index, num_turns)[1]) for index in range(40)}
    assert max(counts) <= num_turns
    assert counts == {num_turns} if num_turns < 30 else min(counts) < 30
    _, asked = world.turns(7, 200)  # everything that the scene holds
    assert len(asked) == len({(task, repr(sample)) for task, sample in asked}) > 5
    assert world.conversation(7, "all", 2)[1] == world.conversation(7, "all", 200)[1][:4]


def test_conversations_of_all_tasks_hold_out_what_others_do() -> None:
    """Training says nothing of held-out pairs and words; in test, what is pointed at is held out."""
    held_out = {f"{color} {shape}" for color in COLORS for shape in SHAPES if is_held_out_pair(color, shape)}
    regions = 0
    for index in range(80):
        scene, messages = World(size=64).conversation(index, "all", 6)
        text = "\n".join(message["content"] for message in messages)
        assert not [pair for pair in held_out if re.search(rf"\b{pair}\b", text)]
        assert not [word for word in re.findall(r"\b[A-Z]{3,5}\b", text) if is_held_out_word(word)]
        scene, asked = Recorder("synthetic", "test", 64).turns(index, 6)
        boxes = {shape.rect.box for shape in scene.shapes if is_held_out_pair(shape.color, shape.shape)}
        boxes |= {thing.rect.box for thing in (*scene.people, *scene.words)}
        for task, sample in asked:
            if task in ("rec", "reg"):
                regions += 1
                assert sample.box in boxes, (index, task)
    assert regions > 15


def test_a_mixture_of_all_tasks() -> None:
    found = WorldMixture([{"task": "all", "num_turns": 3}, "text"], batch_size=2, epoch_size=8, size=64)
    for ref in found.order():
        sample = found.read(ref)
        if sample.type == "text":
            continue
        assert sample.task == "all"
        assert list(sample.messages) == World(size=64).conversation(ref.index, "all", 3)[1]
        assert sample.open_image().size == (64, 64)
