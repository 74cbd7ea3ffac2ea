"""SPHINX-nano's tokenizer: what the world says comes back whole, in few pieces."""

from __future__ import annotations

import pytest

from sphinxkit.formatters import create as create_template
from sphinxkit.nano.stages import tokenizer as nano_tokenizer
from sphinxkit.nano.world import TASKS, World
from sphinxkit.nano.world.world import ALL_TASKS, TEXT_TASK
from sphinxkit.recipe import shipped_folder
from sphinxkit.tokenizer import Tokenizer

NUM_SCENES = 4
SHIPPED = shipped_folder() / "nano" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SHIPPED)


def said(task: str, world: World, count: int = NUM_SCENES) -> list[str]:
    if task == TEXT_TASK:
        return [world.text(index) for index in range(count)]
    template = create_template(nano_tokenizer.CONVERSATION)
    return [template.render(world.conversation(index, task, 4)[1]).text for index in range(count)]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("task", [*TASKS, ALL_TASKS])
def test_what_is_said_comes_back(tokenizer: Tokenizer, task: str, size: int) -> None:
    for world in (World("synthetic", "test", size), World("real", "train", size, point_grid=128)):
        for text in said(task, world):
            ids = tokenizer.encode(text, bos=True, eos=True)
            assert tokenizer.unk_id not in ids
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert tokenizer.decode(ids[1:-1]) == text


def test_coordinates_on_the_grid_are_one_piece(tokenizer: Tokenizer) -> None:
    pieces = nano_tokenizer.coordinate_pieces()
    assert pieces[0] == "0.000"
    assert pieces[1] == "0.008"  # 1/128
    assert pieces[-1] == ",1.000"
    assert len(pieces) == len(set(pieces)) == 2 * 129
    assert {len(tokenizer.encode(piece)) for piece in pieces} == {1}
    assert len(tokenizer.encode("[0.250,0.500,0.758,1.000]")) == 6
    assert len(tokenizer.encode("[0.250,0.500,0.758,1.000;0.000,0.008,0.016,0.023]")) == 11
    assert len(tokenizer.encode("0.123")) == len("0.123")  # spelled: it is none of them


@pytest.mark.parametrize("size", [64, 128])
def test_boxes_lie_on_the_grid(tokenizer: Tokenizer, size: int) -> None:
    world = World(size=size)
    for index in range(20):
        answer = world.conversation(index, "rec")[1][1]["content"]
        assert len(tokenizer.encode(answer)) == 6


def test_capitals_and_digits_are_spelled(tokenizer: Tokenizer) -> None:
    """A word that nobody has seen takes as many pieces as any other of its length."""
    for split in ("train", "test"):
        world = World(split=split)
        words = [word.text for index in range(40) for word in world.scene_of_kind(index, "texts").words]
        assert all(len(tokenizer.encode(word)) == len(word) for word in words)
        assert any(word.isdigit() for word in words)


def test_a_frame_is_few_pieces(tokenizer: Tokenizer) -> None:
    template = create_template(nano_tokenizer.CONVERSATION)
    assert len(tokenizer.encode(template.system + template.opening)) == 1
    messages = [{"role": "user", "content": "Detect all circles shown in the image."}]
    ids = tokenizer.encode(template.prompt(messages))
    # system, " Human:", "Detect all", " circles", " shown in the image.", separator, " Assistant:" and a few joints
    assert len(ids) <= 12


def test_parts_of_a_wording() -> None:
    parts = nano_tokenizer._fixed_parts("Detect all {category} shown in the image.")
    assert parts == ["Detect all", " shown in the image."]
    assert nano_tokenizer._fixed_parts("{question}\nAnswer it.") == ["\nAnswer it."]


def test_training_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano_tokenizer, "NUM_RECORDS", 6)
    first = nano_tokenizer.train_tokenizer()
    assert nano_tokenizer.train_tokenizer() == first
    found = Tokenizer(first)
    assert {len(found.encode(piece)) for piece in nano_tokenizer.coordinate_pieces()} == {1}
    assert found.unk_id not in found.encode("the quick brown fox jumps over the lazy dog")


@pytest.mark.slow
def test_training_gives_the_shipped_pieces(tokenizer: Tokenizer) -> None:
    """The order of equally frequent merges aside, which moved when charts of 64 pixels got fewer bars."""
    found = Tokenizer(nano_tokenizer.train_tokenizer())

    def pieces(each: Tokenizer) -> set[str]:
        return {each._model._processor.id_to_piece(token) for token in range(each.vocab_size)}

    assert pieces(found) == pieces(tokenizer)
    for task in TASKS:
        for text in said(task, World(size=64), 40):
            assert [found.decode([token]) for token in found.encode(text)] == [
                tokenizer.decode([token]) for token in tokenizer.encode(text)
            ]
