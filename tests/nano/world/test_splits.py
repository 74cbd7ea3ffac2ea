from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from sphinxkit.data.permutation import derive_key
from sphinxkit.errors import DataError
from sphinxkit.nano.world import (
    COLORS,
    KINDS,
    SHAPES,
    TASKS,
    Scene,
    World,
    is_held_out_layout,
    is_held_out_pair,
    is_held_out_pose,
    is_held_out_word,
    split_of,
)
from sphinxkit.nano.world.splits import NUM_CLASSES, SPLIT_CLASSES, check_split

NUM_SCENES = 60


def scenes(split: str, domain: Any = "synthetic") -> list[Scene]:
    world = World(domain, split)
    return [world.scene_of_kind(index, kind) for kind in KINDS for index in range(NUM_SCENES)]


def words_of(scene: Scene) -> list[str]:
    titles = [word for block in scene.blocks for word in block.text]
    bars = scene.chart.bars if scene.chart else ()
    return [word.text for word in scene.words] + titles + [bar.label for bar in bars]


def layout_of(scene: Scene) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(block.kind for block in column if block.kind != "title") for column in scene.columns)


def test_every_content_has_one_split() -> None:
    assert sorted(number for classes in SPLIT_CLASSES.values() for number in classes) == list(range(NUM_CLASSES))
    assert [split_of(number) for number in (0, 1, 2, 7, 8)] == ["test", "val", "train", "train", "test"]
    with pytest.raises(DataError, match="split 'dev', expected one of test, train, val"):
        check_split("dev")


def test_pairs_are_held_out_once_for_every_colour_and_shape() -> None:
    pairs = [(color, shape) for color, shape in product(COLORS, SHAPES) if is_held_out_pair(color, shape)]
    assert len(pairs) == 8
    assert {color for color, _ in pairs} == set(COLORS)
    assert {shape for _, shape in pairs} == set(SHAPES)
    assert is_held_out_pair("red", "circle")
    assert not is_held_out_pair("red", "square")


@pytest.mark.parametrize("domain", ["real", "synthetic"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_scenes_hold_what_their_split_may(split: str, domain: str) -> None:
    is_test = split == "test"
    found = scenes(split, domain)
    for scene in found:
        assert split_of(scene.content_hash) == split
        assert all(is_held_out_word(word) == is_test for word in words_of(scene))
        assert all(is_held_out_pose(person.pose.limbs, person.pose.facing) == is_test for person in scene.people)
        assert not scene.columns or is_held_out_layout(layout_of(scene)) == is_test
        pairs = [is_held_out_pair(shape.color, shape.shape) for shape in scene.shapes]
        assert not pairs or pairs[0] == is_test
        assert is_test or not any(pairs)
    assert sum(map(bool, map(words_of, found))) > NUM_SCENES
    if is_test:  # about half of the shapes after the first
        others = [is_held_out_pair(s.color, s.shape) for scene in found for s in scene.shapes[1:]]
        assert 0.3 < sum(others) / len(others) < 0.7


def test_no_two_splits_share_a_scene_at_any_seed() -> None:
    hashes = {
        split: {
            World(domain, split, seed=seed).scene_of_kind(index, kind).content_hash
            for domain in ("real", "synthetic")
            for seed in (0, 1)
            for kind in KINDS
            for index in range(25)
        }
        for split in SPLIT_CLASSES
    }
    assert all(len(found) > 600 for found in hashes.values())
    assert not hashes["train"] & hashes["val"]
    assert not hashes["train"] & hashes["test"]
    assert not hashes["val"] & hashes["test"]


def test_training_never_says_what_is_held_out() -> None:
    pairs = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES) if is_held_out_pair(color, shape)]
    for domain in ("real", "synthetic"):
        world = World(domain, "train")
        for task in TASKS:
            for index in range(20):
                record = world.record(index, task, num_turns=5)
                said = record.get("text", "") + " ".join(turn["value"] for turn in record.get("conversations", []))
                assert not [pair for pair in pairs if pair in said]
                assert not [word for word in said.split('"')[1::2] if is_held_out_word(word)]


def test_test_questions_are_about_what_is_held_out() -> None:
    world = World("synthetic", "test")
    for index in range(40):
        scene = world.scene(index, "reg")
        held_out = {shape.rect.box for shape in scene.shapes if is_held_out_pair(shape.color, shape.shape)}
        people = {person.rect.box for person in scene.people}
        assert {sample.box for sample in world.samples(index, "reg")} <= held_out | people


def test_paragraphs_belong_to_their_split() -> None:
    for split in SPLIT_CLASSES:
        for index in range(30):
            for paragraph in World(split=split).text(index).split("\n"):
                assert split_of(derive_key("prose", paragraph)) == split
