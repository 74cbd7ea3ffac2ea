"""Loads batches of a mixture for one rank, with any number of workers, from any position."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sphinxkit.data.conversations import OverLengthError
from sphinxkit.data.mixture import Mixture
from sphinxkit.data.samples import Sample, SampleType
from sphinxkit.data.sources.base import ShardChangedError
from sphinxkit.errors import DataError

BAD_RATE_AFTER = 100  # samples before which the rate of bad ones says little; our choice

Transform = Callable[[Sample], Any]
"""Makes of a sample what training takes; raises ``DataError`` for one that cannot be used (an unreadable image).

A list is several examples of one sample. If what it makes has an ``is_truncated`` that is true, the sample counts as
truncated.
"""


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class MixtureBatch:
    """One rank's part of a batch.

    Args:
        epoch: Epoch number.
        end: Number of samples of the epoch consumed by all ranks including this batch; the position to resume from.
        type: Type of every sample.
        ids: Ids of ``samples``.
        samples: Transformed samples; more than ``ids`` where the transform makes several of one.
        bad: Samples that could not be used; they are not replaced.
        skipped: Samples left out by ``over_length: skip``.
        truncated: Ids of ``samples`` truncated by ``over_length: truncate``.
    """

    epoch: int
    end: int
    type: SampleType
    ids: list[str]
    samples: list[Any]
    bad: list[BadSample] = field(default_factory=list)
    skipped: list[BadSample] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)


class _EpochDataset(IterableDataset[MixtureBatch]):
    """One rank's batches of one epoch from a given sample; worker w of W takes every W-th batch."""

    def __init__(
        self, mixture: Mixture, transform: Transform | None, rank: int, world_size: int, epoch: int, start: int
    ) -> None:
        self.mixture, self.transform = mixture, transform
        self.rank, self.world_size, self.epoch, self.start = rank, world_size, epoch, start

    def __iter__(self) -> Iterator[MixtureBatch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        position, number = self.start, 0
        while position < self.mixture.num_samples:
            size = self.mixture.batch_length(position)
            if number % num_workers == worker:
                yield self._read(position)
            position += size
            number += 1

    def _read(self, position: int) -> MixtureBatch:
        kind, refs = self.mixture.batch(position, self.epoch)
        first, end = (len(refs) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        batch = MixtureBatch(self.epoch, position + len(refs), kind, [], [])
        for ref in refs[first:end]:
            name = self.mixture.sample_id(ref)
            try:
                sample = self.mixture.read(ref)
                made = sample if self.transform is None else self.transform(sample)
            except ShardChangedError:
                raise
            except OverLengthError as error:
                batch.skipped.append(BadSample(name, str(error)))
            except DataError as error:
                batch.bad.append(BadSample(name, str(error)))
            else:
                batch.ids.append(name)
                batch.samples.extend(made if isinstance(made, list) else [made])
                if getattr(made, "is_truncated", False):
                    batch.truncated.append(name)
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """Ctrl-C and the SIGTERM of a batch system go to every process of a group: the main one decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class MixtureLoader:
    """Iterate over a mixture's batches for one rank, for some epochs or endlessly.

    The sequence of batches depends on the mixture alone, not on the number of workers. Every rank gets the same number
    of batches; if a batch has fewer samples than ranks, a rank's part may be empty.

    Args:
        mixture: What to read.
        transform: Applied to each sample; None: return the ``Sample``. With workers it must be picklable, unless the
            start method is ``fork``.
        rank: This process.
        world_size: How many processes share each batch.
        num_workers: Number of worker processes; 0: read in this process.
        num_epochs: Number of epochs; None: endless.
    Raises:
        DataError: ``rank`` is not in range(world_size).
    """

    def __init__(
        self,
        mixture: Mixture,
        transform: Transform | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_epochs: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"mixture loader: rank {rank} is not in range({world_size})")
        self.mixture, self.transform = mixture, transform
        self.rank, self.world_size, self.num_workers, self.num_epochs = rank, world_size, num_workers, num_epochs
        self.epoch, self.position = 0, 0
        self.num_seen, self.num_bad, self.num_skipped, self.num_truncated = 0, 0, 0, 0

    def __iter__(self) -> Generator[MixtureBatch, None, None]:
        """Yield batches from the current position.

        Raises:
            DataError: The share of bad samples is above ``mixture.max_bad_rate``.
        """
        while self.num_epochs is None or self.epoch < self.num_epochs:
            if self.position < self.mixture.num_samples:
                dataset = _EpochDataset(
                    self.mixture, self.transform, self.rank, self.world_size, self.epoch, self.position
                )
                batches = DataLoader(
                    dataset,
                    batch_size=None,
                    num_workers=self.num_workers,
                    collate_fn=_as_it_is,
                    worker_init_fn=_leave_signals,
                    generator=torch.Generator(),  # its own, or every start would draw from the run's random state
                )
                for batch in batches:
                    self.position = batch.end
                    self._count(batch)
                    yield batch
            self.epoch, self.position = self.epoch + 1, 0

    def _count(self, batch: MixtureBatch) -> None:
        self.num_seen += len(batch.ids) + len(batch.bad) + len(batch.skipped)
        self.num_bad += len(batch.bad)
        self.num_skipped += len(batch.skipped)
        self.num_truncated += len(batch.truncated)
        allowed = self.mixture.max_bad_rate * max(self.num_seen, BAD_RATE_AFTER)
        if self.num_bad > allowed:
            last = batch.bad[-1].reason if batch.bad else "see the reports before"
            raise DataError(
                f"mixture: {self.num_bad} of {self.num_seen} samples are bad, more than the allowed "
                f"{self.mixture.max_bad_rate:.2%}; the last: {last}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch; valid for any number of ranks and workers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "fingerprint": self.mixture.fingerprint(),
            "num_seen": self.num_seen,
            "num_bad": self.num_bad,
            "num_skipped": self.num_skipped,
            "num_truncated": self.num_truncated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state.

        Raises:
            DataError: The state belongs to another mixture.
        """
        if state["fingerprint"] != self.mixture.fingerprint():
            raise DataError(
                f"mixture: the state is of mixture {state['fingerprint']}, this is {self.mixture.fingerprint()}: the "
                "sources, their sizes, the batch size or the seed differ"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self.num_seen, self.num_bad, self.num_skipped = state["num_seen"], state["num_bad"], state["num_skipped"]
        self.num_truncated = state["num_truncated"]
