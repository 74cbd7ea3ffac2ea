"""Mixes several sources into epochs: contents, order and each reader's part.

An epoch is a pure function of the sources, the seed and the epoch's number. Its samples are numbered, so a run can stop
and resume at any sample. Ranks share every batch, workers take batches in turn, and together they read each sample of
the epoch once.
Source: batches of one type: LLaMA2-Accessory, accessory/data/conversation/dataset.py, its grouped sampler.
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

from sphinxkit.data.conversations import OverLength, read_sample
from sphinxkit.data.permutation import Permutation, block_permutation, derive_key, interleave
from sphinxkit.data.samples import Sample, SampleType
from sphinxkit.data.sources.files import open_source
from sphinxkit.data.sources.index import IndexedSource
from sphinxkit.errors import DataError

Remainder = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """One source of samples.

    Args:
        path: A file, a folder of shards, or a glob: conversations, texts or captions.
        name: Unique name for reports. None: the file's stem, or the folder's name.
        task: Default task for records without one.
        root: Folder that image paths must lie in. "": they are relative to the file's folder, and may lead out of it.
        type: Type of its samples; a batch holds one type. Records without image in an ``image-text`` source form a
            separate part of type ``text``.
        format: ``jsonl``, ``llava`` (a JSON list), ``tar`` or ``parquet``; None: by the ending.
        columns: Our names of values (image, text, caption, question, answer, conversations, messages) -> the file's.
        ratio: Fraction of the source in an epoch, in (0, 1].
        repeat: Number of repetitions per epoch; fractions are allowed.
        weight: Sampling weight relative to the other sources; ``ratio`` and ``repeat`` must then be 1.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    path: str
    name: str | None = None
    task: str = ""
    root: str = ""
    type: SampleType = "image-text"
    format: Literal["jsonl", "llava", "tar", "parquet"] | None = None
    columns: Mapping[str, str] | None = None
    ratio: float = 1.0
    repeat: float = 1.0
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample of an epoch is: the source, the record in it, and how often the epoch had it before."""

    source: int
    index: int
    copy: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """Row of ``Mixture.table``: one source's part of an epoch.

    Args:
        name: Name of the source.
        task: Task of the source.
        type: Type of its samples.
        size: Records in the file.
        count: Samples in an epoch.
        share: Fraction of the epoch, in [0, 1].
    """

    name: str
    task: str
    type: SampleType
    size: int
    count: int
    share: float


class OpenedSource(Protocol):
    """Protocol of a mixture's source: records by number, and the number of them in an epoch."""

    spec: MixtureSource
    name: str
    count: int

    def __len__(self) -> int:
        """Records."""
        ...

    def sample_id(self, index: int) -> str:
        """Names a record in reports."""
        ...

    def read(self, index: int, sample_id: str) -> Sample:
        """One record as a sample of that name; raises ``DataError`` where it cannot be used."""
        ...


@dataclass(slots=True)
class _FileSource:
    """A source's records of one type.

    Args:
        spec: The source.
        name: Unique name for reports.
        records: The records.
        root: Base folder of its image paths.
        count: Samples in an epoch.
    """

    spec: MixtureSource
    name: str
    records: IndexedSource
    root: Path
    count: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def sample_id(self, index: int) -> str:
        return f"{_name(self.spec)}:{self.records.number(index)}"

    def read(self, index: int, sample_id: str) -> Sample:
        record = self.records.read(index)
        is_root, trim = bool(self.spec.root), self.records.is_raw
        sample = read_sample(
            record.fields, sample_id, record.where, self.root, self.spec.task, is_root=is_root, trim=trim
        )
        if sample.type != self.spec.type:
            raise DataError(
                f"{record.where}: the sample is {sample.type}, its source {self.name!r} is {self.spec.type}"
            )
        return sample


@dataclass(frozen=True, slots=True)
class _Group:
    """The sources of one type: their samples are 0 .. size-1, the first source's first."""

    type: SampleType
    members: tuple[int, ...]
    ends: tuple[int, ...] = field(default=())

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0


class Mixture:
    """A mixture of several sources.

    Args:
        sources: ``MixtureSource`` or its fields as mappings.
        batch_size: Samples in a batch over all ranks.
        seed: Random seed of the order, and of the selection from sources that are not used completely.
        epoch_size: Samples in an epoch; required with weights. None: determined by ratios and repeats.
        temperature: Sample each source in proportion to size**(1 / temperature) times its weight: 1 by size, large
            values evenly.
        remainder: Policy for a type's smaller last batch: ``keep`` it (at the end of the epoch) or ``drop`` it.
        over_length: Policy for over-long samples; see ``conversations.encode_sample``.
        max_bad_rate: Maximum fraction of bad samples before the run stops.
        folder: Base folder of relative paths. "": the working folder.
        locality: For cold disks: read each source in blocks of so many neighbouring records, the blocks and the records
            of a block in random order; sources and types take turns evenly. None: any sample may be anywhere.
    Raises:
        DataError: Every error of the arguments; or a source cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        batch_size: int = 1,
        seed: int = 0,
        epoch_size: int | None = None,
        temperature: float | None = None,
        remainder: Remainder = "keep",
        over_length: OverLength = "error",
        max_bad_rate: float = 0.01,
        folder: str = "",
        locality: int | None = None,
    ) -> None:
        specs = [_as_source(index, source) for index, source in enumerate(sources)]
        errors = _errors(specs, batch_size, epoch_size, temperature, remainder, over_length, max_bad_rate)
        if locality is not None and locality < 1:
            errors.append(f"locality must be at least 1, got {locality}")
        if errors:
            raise DataError("mixture: " + "; ".join(errors))
        self.batch_size, self.seed, self.remainder = batch_size, seed, remainder
        self.over_length, self.max_bad_rate, self.temperature = over_length, max_bad_rate, temperature
        self.locality = locality
        base = Path(folder)
        self._sources: Sequence[OpenedSource] = [part for spec in specs for part in _open(spec, base)]
        self._set_counts(epoch_size)
        self._groups = self._make_groups()

    def _set_counts(self, epoch_size: int | None) -> None:
        specs = [source.spec for source in self._sources]
        if self.temperature is None and all(spec.weight is None for spec in specs):
            for source in self._sources:
                source.count = round(len(source) * source.spec.ratio * source.spec.repeat)
            if epoch_size is not None:
                weights = [float(source.count) for source in self._sources]
                self._share_out(weights, epoch_size)
            return
        power = 0.0 if self.temperature is None else 1 / self.temperature
        sizes = Counter[str]()  # of whole files, whose parts share its weight
        for source in self._sources:
            sizes[_name(source.spec)] += len(source)
        weights = [
            (1.0 if source.spec.weight is None else source.spec.weight)
            * sizes[_name(source.spec)] ** power
            * (len(source) / sizes[_name(source.spec)])
            for source in self._sources
        ]
        self._share_out(weights, sum(len(source) for source in self._sources) if epoch_size is None else epoch_size)

    def _share_out(self, weights: Sequence[float], size: int) -> None:
        """Whole numbers in proportion that add up to ``size``: rounded down, the largest remainders rounded up."""
        exact = [size * weight / sum(weights) for weight in weights]
        for source, value in zip(self._sources, exact, strict=True):
            source.count = int(value)
        rest = size - sum(source.count for source in self._sources)
        order = sorted(range(len(exact)), key=lambda index: (int(exact[index]) - exact[index], index))
        for index in order[:rest]:
            self._sources[index].count += 1

    def _make_groups(self) -> list[_Group]:
        groups = []
        for kind in ("text", "image-text"):
            members = tuple(i for i, source in enumerate(self._sources) if source.spec.type == kind and source.count)
            ends = tuple(accumulate(self._sources[index].count for index in members))
            if members:
                groups.append(_Group(kind, members, ends))
        return groups

    @property
    def names(self) -> list[str]:
        """The sources' names."""
        return [source.name for source in self._sources]

    @property
    def files(self) -> list[Path]:
        """The files of samples that are read."""
        every = [path for s in self._sources if isinstance(s, _FileSource) for path in s.records.shards]
        return list(dict.fromkeys(every))

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        full = sum(group.size // self.batch_size for group in self._groups)
        return full + len(self._partial())

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, without those that ``remainder: drop`` leaves out."""
        kept = sum(group.size // self.batch_size * self.batch_size for group in self._groups)
        return kept + sum(group.size % self.batch_size for group in self._partial())

    def _partial(self) -> list[_Group]:
        if self.remainder == "drop":
            return []
        return [group for group in self._groups if group.size % self.batch_size]

    def fingerprint(self) -> str:
        """Hash of what determines the order of samples; a state is valid only for the same fingerprint."""
        parts = [(source.name, len(source), source.count, source.spec.type) for source in self._sources]
        local = () if self.locality is None else (self.locality,)
        return f"{derive_key(parts, self.batch_size, self.seed, self.remainder, *local):016x}"

    def _locate(self, position: int, epoch: int) -> tuple[_Group, int, int]:
        """(group, first, end) of the batch that holds sample ``position``: its members' places within the group."""
        full = [group.size // self.batch_size for group in self._groups]
        batch, within = divmod(position, self.batch_size)
        if batch < sum(full) and self.locality is not None:
            member, number = interleave(full, batch)
            first = number * self.batch_size
            return self._groups[member], first + within, first + self.batch_size
        if batch < sum(full):
            shuffled = Permutation(sum(full), derive_key(self.seed, epoch, "batches"))(batch)
            for group, count in zip(self._groups, full, strict=True):
                if shuffled < count:
                    first = shuffled * self.batch_size
                    return group, first + within, first + self.batch_size
                shuffled -= count
        rest = position - sum(full) * self.batch_size
        for group in self._partial():
            size = group.size % self.batch_size
            if rest < size:
                return group, group.size - size + rest, group.size
            rest -= size
        raise DataError(f"mixture: sample {position} is outside an epoch of {self.num_samples}")

    def batch_length(self, position: int) -> int:
        """Samples from number ``position`` to the end of its batch."""
        full = sum(group.size // self.batch_size for group in self._groups) * self.batch_size
        if position < full:
            return self.batch_size - position % self.batch_size
        rest = position - full
        for group in self._partial():
            size = group.size % self.batch_size
            if rest < size:
                return size - rest
            rest -= size
        raise DataError(f"mixture: sample {position} is outside an epoch of {self.num_samples}")

    def batch(self, position: int, epoch: int = 0) -> tuple[SampleType, list[SampleRef]]:
        """The type and the samples of the batch that holds sample ``position`` of an epoch, from that sample on.

        Raises:
            DataError: The epoch has fewer samples.
        """
        group, first, end = self._locate(position, epoch)
        if self.locality is not None:
            return group.type, [self._local_ref(group, place, epoch) for place in range(first, end)]
        shuffle = Permutation(group.size, derive_key(self.seed, epoch, group.type))
        return group.type, [self._ref(group, shuffle(place), epoch) for place in range(first, end)]

    def _ref(self, group: _Group, entry: int, epoch: int) -> SampleRef:
        member = bisect_right(group.ends, entry)
        number = entry - (group.ends[member - 1] if member else 0)
        source = self._sources[group.members[member]]
        copy, index = divmod(number, len(source))
        if (copy + 1) * len(source) > source.count:  # this pass takes only some: another choice in every epoch
            index = Permutation(len(source), derive_key(self.seed, epoch, source.name, copy))(index)
        return SampleRef(group.members[member], index, copy)

    def _local_ref(self, group: _Group, place: int, epoch: int) -> SampleRef:
        """Sources take turns in proportion to their counts; each is read block by block."""
        member, number = interleave([self._sources[index].count for index in group.members], place)
        source = self._sources[group.members[member]]
        copy, index = divmod(number, len(source))
        key = derive_key(self.seed, epoch, source.name, copy)
        return SampleRef(group.members[member], block_permutation(len(source), self.locality or 1, key, index), copy)

    def sample_id(self, ref: SampleRef) -> str:
        """Names a sample in reports: source and record."""
        return self._sources[ref.source].sample_id(ref.index)

    def read(self, ref: SampleRef) -> Sample:
        """Read one sample.

        Raises:
            DataError: The record cannot be used, or its type is not its source's; names file and line.
        """
        return self._sources[ref.source].read(ref.index, self.sample_id(ref))

    def order(self, epoch: int = 0, start: int = 0) -> Iterator[SampleRef]:
        """Yield the samples of an epoch in order, from number ``start``."""
        while start < self.num_samples:
            _, refs = self.batch(start, epoch)
            yield from refs
            start += len(refs)

    def table(self) -> list[TableRow]:
        """Contents of an epoch, by source."""
        total = sum(source.count for source in self._sources)
        return [
            TableRow(
                name=source.name,
                task=source.spec.task,
                type=source.spec.type,
                size=len(source),
                count=source.count,
                share=source.count / total,
            )
            for source in self._sources
        ]

    def format_table(self) -> str:
        """``table`` as text, one line per source, with the totals."""
        rows = self.table()
        width = max(len("source"), *(len(row.name) for row in rows))
        lines = [
            f"{'source':{width}}  {'type':10}  {'records':>10}  {'in epoch':>10}  {'passes':>7}  {'share':>6}  task"
        ]
        lines += [
            f"{row.name:{width}}  {row.type:10}  {row.size:>10}  {row.count:>10}  {row.count / row.size:>7.2f}  "
            f"{row.share:>6.1%}  {row.task}".rstrip()
            for row in rows
        ]
        total = sum(row.count for row in rows)
        dropped = total - self.num_samples
        batches = f"{self.num_batches} batches of {self.batch_size}" + (
            f", {dropped} samples dropped" if dropped else ""
        )
        return "\n".join(
            [*lines, f"{'total':{width}}  {'':10}  {sum(r.size for r in rows):>10}  {total:>10}  {batches}"]
        )


def _as_source(index: int, source: MixtureSource | Mapping[str, Any]) -> MixtureSource:
    if isinstance(source, MixtureSource):
        return source
    try:
        return MixtureSource(**source)
    except TypeError as error:
        raise DataError(f"mixture: sources[{index}]: {error}") from error


def _name(spec: MixtureSource) -> str:
    path = Path(spec.path)
    return spec.name or (path.parent.name if glob.has_magic(path.name) else path.stem) or spec.path


def _open(spec: MixtureSource, base: Path) -> list[_FileSource]:
    """The source; one that holds images and texts is two, so that batches hold one type."""
    path = base / spec.path
    root = base / spec.root if spec.root else path if path.is_dir() else path.parent
    source, name = open_source(path, spec.format, spec.columns), _name(spec)
    if spec.type == "text":
        return [_FileSource(spec, name, source, root)]
    return [
        _FileSource(replace(spec, type=kind), f"{name} (text)" if kind == "text" else name, part, root)
        for kind, part in source.split()
    ]


def _errors(
    specs: Sequence[MixtureSource],
    batch_size: int,
    epoch_size: int | None,
    temperature: float | None,
    remainder: str,
    over_length: str,
    max_bad_rate: float,
) -> list[str]:
    checks = [
        (bool(specs), "there are no sources"),
        (batch_size >= 1, f"batch_size must be at least 1, got {batch_size}"),
        (epoch_size is None or epoch_size >= 1, f"epoch_size must be at least 1, got {epoch_size}"),
        (temperature is None or temperature > 0, f"temperature must be positive, got {temperature}"),
        (remainder in ("keep", "drop"), f"remainder must be keep or drop, got {remainder!r}"),
        (
            over_length in get_args(OverLength),
            f"over_length must be error, truncate, skip or continue, got {over_length!r}",
        ),
        (0 <= max_bad_rate <= 1, f"max_bad_rate must be in [0, 1], got {max_bad_rate}"),
    ]
    weighted = [spec.weight is not None for spec in specs]
    checks += [
        (all(weighted) or not any(weighted), "either every source has a weight or none"),
        (not any(weighted) or epoch_size is not None, "weights need an epoch_size"),
        (not any(weighted) or sum(spec.weight or 0 for spec in specs) > 0, "the weights add up to 0"),
    ]
    names = [_name(spec) for spec in specs]
    for index, spec in enumerate(specs):
        where = f"sources[{index}] ({names[index]})"
        drawn = spec.weight is not None or temperature is not None
        checks += [
            (names[index] not in names[:index], f"{where}: the name is taken; give it one of its own"),
            (spec.type in ("text", "image-text"), f"{where}: type must be text or image-text, got {spec.type!r}"),
            (0 < spec.ratio <= 1, f"{where}: ratio must be in (0, 1], got {spec.ratio}"),
            (spec.repeat > 0, f"{where}: repeat must be positive, got {spec.repeat}"),
            (spec.weight is None or spec.weight >= 0, f"{where}: weight must not be negative, got {spec.weight}"),
            (
                not drawn or (spec.ratio == 1 and spec.repeat == 1),
                f"{where}: ratio and repeat do not go with weights or a temperature",
            ),
        ]
    return [message for good, message in checks if not good]
