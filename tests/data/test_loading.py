from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphinxkit.data.conversations import OverLengthError
from sphinxkit.data.loading import BadSample, MixtureLoader
from sphinxkit.data.mixture import Mixture, MixtureSource
from sphinxkit.data.samples import Sample
from sphinxkit.errors import DataError

NUM_IMAGE_TEXT, NUM_TEXT = 23, 11
pytestmark = [
    # more workers than cores, on purpose
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # Python 3.12 warns about forking a process in which torch has started threads
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"image": f"{index}.png", "conversations": turns} for index in range(NUM_IMAGE_TEXT)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": f"t{index}"}) for index in range(NUM_TEXT)))
    return folder


def mixture_of(folder: Path, **options: Any) -> Mixture:
    sources = [MixtureSource("a.jsonl"), MixtureSource("t.jsonl", type="text")]
    return Mixture(sources, **{"batch_size": 6, "folder": str(folder), **options})


def name_of(sample: Sample) -> str:
    return sample.id


def read(mixture: Mixture, **options: Any) -> list[str]:
    return [name for batch in MixtureLoader(mixture, name_of, num_epochs=1, **options) for name in batch.samples]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_and_workers_together_read_the_epoch_once(folder: Path, world_size: int, num_workers: int) -> None:
    mixture = mixture_of(folder)
    parts = [read(mixture, rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)]
    wanted = [f"a:{index}" for index in range(NUM_IMAGE_TEXT)] + [f"t:{index}" for index in range(NUM_TEXT)]
    assert Counter(itertools.chain(*parts)) == Counter(wanted)


def test_the_sequence_does_not_depend_on_the_workers(folder: Path) -> None:
    mixture = mixture_of(folder)
    alone = read(mixture)
    assert alone == [mixture.sample_id(ref) for ref in mixture.order()]
    for num_workers in (1, 2, 3):
        assert read(mixture, num_workers=num_workers) == alone


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2 * (NUM_IMAGE_TEXT + NUM_TEXT) - 1), st.integers(1, 8), st.integers(1, 3))
def test_resuming_at_any_sample_goes_on_with_the_same_sequence(
    folder: Path, start: int, batch_size: int, world_size: int
) -> None:
    mixture = mixture_of(folder, batch_size=batch_size)
    whole = [mixture.sample_id(ref) for epoch in (0, 1) for ref in mixture.order(epoch)]
    parts = []
    for rank in range(world_size):
        loader = MixtureLoader(mixture, name_of, num_epochs=2, rank=rank, world_size=world_size)
        loader.epoch, loader.position = divmod(start, mixture.num_samples)
        parts.append([batch.samples for batch in loader])
    assert [name for batches in zip(*parts, strict=True) for batch in batches for name in batch] == whole[start:]


@pytest.mark.parametrize(("num_workers", "stops"), [(0, (0, 1, 6, 7, 8, 15)), (2, (6, 8))])
def test_resuming_from_a_state(folder: Path, num_workers: int, stops: tuple[int, ...]) -> None:
    mixture = mixture_of(folder)
    whole = [batch.ids for batch in MixtureLoader(mixture, num_epochs=3)]
    for stop in stops:  # an epoch has 6 batches
        first = MixtureLoader(mixture, num_workers=num_workers)
        before = [batch.ids for batch in itertools.islice(first, stop)]
        state = json.loads(json.dumps(first.state_dict()))
        second = MixtureLoader(mixture_of(folder), num_epochs=3)
        second.load_state_dict(state)
        assert before + [batch.ids for batch in second] == whole
        assert second.num_seen == 3 * mixture.num_samples


def test_a_state_holds_for_another_number_of_ranks(folder: Path) -> None:
    mixture = mixture_of(folder)
    loader = MixtureLoader(mixture, rank=0, world_size=2)
    next(iter(loader))
    state = loader.state_dict()
    rest: list[str] = []
    for rank in range(3):
        other = MixtureLoader(mixture, rank=rank, world_size=3, num_epochs=1)
        other.load_state_dict(state)
        rest += [name for batch in other for name in batch.ids]
    assert Counter(rest) == Counter(mixture.sample_id(ref) for ref in mixture.order(0, 6))


def test_a_state_of_another_mixture_is_refused(folder: Path) -> None:
    state = MixtureLoader(mixture_of(folder)).state_dict()
    with pytest.raises(DataError, match="the state is of mixture .*, this is .*: the sources, their sizes"):
        MixtureLoader(mixture_of(folder, seed=1)).load_state_dict(state)


def test_ranks_get_as_many_batches_of_the_same_type(folder: Path) -> None:
    mixture = mixture_of(folder, batch_size=4)
    parts = [list(MixtureLoader(mixture, num_epochs=1, rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    for batches in zip(*parts, strict=True):
        assert len({(batch.type, batch.end) for batch in batches}) == 1


def test_reading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    read(mixture_of(folder), num_workers=2)
    assert torch.equal(before, torch.random.get_rng_state())


def fail_on(names: set[str]) -> Any:
    def transform(sample: Sample) -> str:
        if sample.id in names:
            raise DataError(f"{sample.id} is unreadable")
        return sample.id

    return transform


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_reported_and_nothing_takes_their_place(folder: Path, num_workers: int) -> None:
    loader = MixtureLoader(
        mixture_of(folder, max_bad_rate=0.05),
        fail_on({"a:3", "t:1"}),
        num_epochs=1,
        num_workers=num_workers,
    )
    batches = list(loader)
    names = [name for batch in batches for name in batch.samples]
    assert len(names) == len(set(names)) == NUM_IMAGE_TEXT + NUM_TEXT - 2
    assert sorted((bad for batch in batches for bad in batch.bad), key=lambda bad: bad.id) == [
        BadSample("a:3", "a:3 is unreadable"),
        BadSample("t:1", "t:1 is unreadable"),
    ]
    assert (loader.num_bad, loader.num_seen, loader.num_skipped) == (2, NUM_IMAGE_TEXT + NUM_TEXT, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(folder: Path, num_workers: int) -> None:
    bad = {f"a:{index}" for index in range(NUM_IMAGE_TEXT)}
    loader = MixtureLoader(mixture_of(folder), fail_on(bad), num_workers=num_workers)
    with pytest.raises(
        DataError, match=r"samples are bad, more than the allowed 1\.00%; the last: a:\d+ is unreadable"
    ):
        list(loader)
    with pytest.raises(DataError, match=r"1 of \d+ samples are bad, more than the allowed 0\.00%"):
        list(MixtureLoader(mixture_of(folder, max_bad_rate=0), fail_on({"a:0"})))


def test_records_that_cannot_be_read_are_bad_samples(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n{"text": ""}\n{"tex\n')
    mixture = Mixture([MixtureSource("t.jsonl", type="text")], folder=str(tmp_path), max_bad_rate=1.0)
    batches = list(MixtureLoader(mixture, num_epochs=1))
    seen = [bad for batch in batches for bad in batch.bad]
    assert len([name for batch in batches for name in batch.ids]) == 1
    assert {bad.id for bad in seen} == {"t:1", "t:2"}
    assert any("t.jsonl:2: 'text' must be a text that is not empty" in bad.reason for bad in seen)


def test_skipped_samples_are_counted_apart(folder: Path) -> None:
    def skip(sample: Sample) -> str:
        if sample.type == "text":
            raise OverLengthError("too long")
        return sample.id

    loader = MixtureLoader(mixture_of(folder), skip, num_epochs=1)
    assert sum(len(batch.skipped) for batch in loader) == loader.num_skipped == NUM_TEXT
    assert loader.num_bad == 0


@dataclass
class Cut:
    """What a transform makes of a sample, as training's examples are."""

    id: str
    is_truncated: bool


def cut_texts(sample: Sample) -> Cut:
    return Cut(sample.id, sample.type == "text")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_truncated_samples_are_counted(folder: Path, num_workers: int) -> None:
    loader = MixtureLoader(mixture_of(folder), cut_texts, num_epochs=1, num_workers=num_workers)
    for batch in loader:
        assert batch.truncated == (batch.ids if batch.type == "text" else [])
    state = loader.state_dict()
    assert state["num_truncated"] == loader.num_truncated == NUM_TEXT
    other = MixtureLoader(mixture_of(folder))
    other.load_state_dict(state)
    assert (other.num_truncated, other.num_skipped, other.num_bad) == (NUM_TEXT, 0, 0)


def test_a_fault_of_the_code_is_not_a_bad_sample(folder: Path) -> None:
    def broken(sample: Sample) -> str:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(MixtureLoader(mixture_of(folder), broken))


def test_rank_outside_the_world(folder: Path) -> None:
    with pytest.raises(DataError, match=r"mixture loader: rank 2 is not in range\(2\)"):
        MixtureLoader(mixture_of(folder), rank=2, world_size=2)
