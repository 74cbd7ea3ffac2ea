from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from sphinxkit.data.loading import MixtureLoader
from sphinxkit.data.mixture import Mixture
from sphinxkit.errors import DataError
from sphinxkit.nano.world import TASKS, World, WorldMixture, WorldSample, WorldSource, render
from sphinxkit.registry import Registry

SOURCES: list[Any] = [
    {"task": "vqa", "weight": 2, "num_turns": 3},
    {"task": "rec", "domain": "real"},
    WorldSource("text"),
]


def mixture(**options: Any) -> WorldMixture:
    return WorldMixture(**{"sources": SOURCES, "batch_size": 4, "epoch_size": 80, "size": 64, **options})


def described(sample: Any) -> tuple[Any, ...]:
    return sample.id, sample.task, sample.messages, sample.text


def test_an_epoch_holds_what_the_weights_say() -> None:
    found = mixture()
    assert [(row.name, row.count, row.type) for row in found.table()] == [
        ("synthetic-vqa", 40, "image-text"),
        ("real-rec", 20, "image-text"),
        ("synthetic-text", 20, "text"),
    ]
    counts = Counter(found.read(ref).task for ref in found.order())
    assert counts == {"vqa": 40, "rec": 20, "text": 20}
    assert "20 batches of 4" in found.format_table()


def test_samples_are_the_worlds() -> None:
    found = mixture()
    for ref in found.order():
        sample = found.read(ref)
        assert isinstance(sample, WorldSample)
        assert sample.id == found.sample_id(ref)
        if sample.task == "text":
            assert sample.type == "text"
            assert sample.text == World(size=64).text(ref.index)
            with pytest.raises(DataError, match="it has no image"):
                sample.open_image()
            continue
        world = World("real" if sample.task == "rec" else "synthetic", size=64)
        scene, messages = world.conversation(ref.index, sample.task, 3 if sample.task == "vqa" else 1)
        assert sample.type == "image-text"
        assert list(sample.messages) == messages
        assert np.array_equal(np.asarray(sample.open_image()), render(scene))


def test_batches_of_one_type_and_other_scenes_in_every_epoch() -> None:
    found = mixture()
    epochs = [list(MixtureLoader(found, num_epochs=2))[start : start + 20] for start in (0, 20)]
    for batch in epochs[0]:
        assert {sample.type for sample in batch.samples} == {batch.type}
    first, second = ({name for batch in epoch for name in batch.ids} for epoch in epochs)
    assert len(first) == len(second) == 80
    assert not first & second


def test_ranks_workers_and_resuming() -> None:
    found = mixture()
    whole = [described(sample) for batch in MixtureLoader(found, num_epochs=1) for sample in batch.samples]
    ranks = [MixtureLoader(found, rank=rank, world_size=2, num_workers=rank, num_epochs=1) for rank in (0, 1)]
    parts = [described(s) for one, two in zip(*ranks, strict=True) for batch in (one, two) for s in batch.samples]
    assert parts == whole
    loader = MixtureLoader(found, num_epochs=1)
    stream = iter(loader)
    for _ in range(7):
        next(stream)
    resumed = MixtureLoader(mixture(), num_epochs=1)
    resumed.load_state_dict(loader.state_dict())
    assert [described(sample) for batch in resumed for sample in batch.samples] == whole[28:]


def test_the_fingerprint_tells_other_worlds() -> None:
    others = [
        mixture(),
        mixture(size=(80, 64)),
        mixture(seed=1),
        mixture(split="val"),
        mixture(options={"max_objects": 2}),
        mixture(options={"point_grid": 128}),
        mixture(options={"has_all_wordings": True}),
        mixture(options={"rounds": 2}),
        mixture(options={"told_first_percent": 50}),
        mixture(options={"context_percent": 50}),
        mixture(options={"question_starts": ["Is"]}),
        mixture(options={"has_lookups": True}),
        mixture(options={"choice_letters": 1}),
        mixture(sources=[{"task": "vqa", "has_image": False}, *SOURCES[1:]]),
        mixture(options={"wordings": {"vqa": "{question}"}}),
        mixture(sources=[*SOURCES[:2], {"task": "text", "options": {"domain": "real"}}]),
        mixture(sources=[{"task": "vqa", "weight": 2}, *SOURCES[1:]]),
    ]
    assert len({found.fingerprint() for found in others}) == len(others)
    assert mixture().fingerprint() == others[0].fingerprint()
    assert pickle.loads(pickle.dumps(mixture())).fingerprint() == mixture().fingerprint()


def test_a_fixed_number_of_scenes() -> None:
    found = mixture(sources=[WorldSource("caption", num_scenes=20)])
    assert Counter(ref.index for ref in found.order()) == dict.fromkeys(range(20), 4)


def test_a_conversation_without_its_picture() -> None:
    sources = [{"task": "vqa", "has_image": with_picture, "name": str(with_picture)} for with_picture in (True, False)]
    found = mixture(sources=sources)
    samples = {ref.index: found.read(ref) for ref in found.order()}
    assert Counter(sample.type for sample in samples.values()) == {"text": 40, "image-text": 40}
    assert all(sample.type == ("image-text" if sample.id.startswith("True") else "text") for sample in samples.values())
    bare = next(sample for sample in samples.values() if sample.type == "text")
    assert bare.messages
    with pytest.raises(DataError, match="it has no image"):
        bare.open_image()


def test_a_recipe_names_it() -> None:
    registry: Registry[Mixture] = Registry("mixture", {})
    built = registry.build(
        "sphinxkit.nano.world:WorldMixture", sources=list(TASKS), batch_size=2, size=[64, 96], epoch_size=32
    )
    sample = built.read(next(iter(built.order())))
    assert sample.type == "text" or sample.open_image().size == (64, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "expected sources, and batch_size and epoch_size of at least 1, got 0 sources"),
        ({"batch_size": 0}, "got 3 sources, batch_size 0"),
        ({"epoch_size": 0}, "epoch_size 0"),
        ({"sources": ["vqa", "vqa"]}, "names must be unique .*repeated: \\['synthetic-vqa'\\]"),
        ({"sources": [{"task": "vqa", "weight": 0}]}, "weights positive; repeated: \\[\\], weights: \\[0\\]"),
        ({"sources": [{"task": "vqa", "weight": -1}]}, "weights positive"),
        ({"sources": ["vqq"]}, "sources\\[0\\]: unknown task 'vqq'; did you mean 'vqa'"),
        ({"sources": [{"tsk": "vqa"}]}, "sources\\[0\\]: .*unexpected keyword argument 'tsk'"),
        ({"options": {"colour": 1}}, "sources\\[0\\]: .*unexpected keyword argument 'colour'"),
        ({"sources": [{"task": "vqa", "domain": "dream"}]}, "domain 'dream', expected real or synthetic"),
    ],
)
def test_what_cannot_be_mixed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mixture(**options)
