"""Inspects a file of samples or a mixture: tokens and labels as the model is trained on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.data.conversations import OverLength, encode_sample, read_sample
from sphinxkit.data.mixture import Mixture
from sphinxkit.data.samples import Sample
from sphinxkit.data.sources.index import IndexedSource
from sphinxkit.errors import DataError, SphinxkitError
from sphinxkit.formatters import IGNORE_INDEX, ConversationTemplate, EncodedConversation
from sphinxkit.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SampleEncoder:
    """Encodes samples to tokens.

    Args:
        tokenizer: The tokenizer.
        template: Template of conversations.
        max_tokens: Maximum length of a sample; None: any length.
        over_length: Policy for longer samples.
        opens_images: Whether to open images; an unreadable image makes a bad sample.
    """

    tokenizer: Tokenizer
    template: ConversationTemplate
    max_tokens: int | None = None
    over_length: OverLength = "error"
    opens_images: bool = True

    def encode(self, sample: Sample) -> EncodedConversation:
        """Token ids and labels.

        Raises:
            DataError: The sample cannot be used.
        """
        if self.opens_images and sample.image is not None:
            sample.open_image()
        return encode_sample(sample, self.template, self.tokenizer, self.max_tokens, self.over_length)

    def pieces(self, sample: Sample) -> list[str]:
        """The text that each token adds; a character of several byte tokens belongs to the first of them."""
        source = self.template.render(sample.messages).text if sample.messages else sample.text
        pieces, done = [], 0
        for _, end in self.tokenizer.encode_with_offsets(source)[1]:
            pieces.append(source[done : max(done, end)])
            done = max(done, end)
        return ["<s>", *pieces, "</s>"]  # the special tokens around the text have names instead of characters


@dataclass(frozen=True, slots=True)
class InspectedSample:
    """An encoded sample, or the reason why it cannot be used.

    Args:
        id: Name of the sample.
        where: "file:line".
        sample: The sample; None if its record cannot be read.
        encoded: The encoded sample; None if it cannot be used.
        pieces: The text of each token, including truncated ones.
        error: Why it cannot be used.
    """

    id: str
    where: str
    sample: Sample | None = None
    encoded: EncodedConversation | None = None
    pieces: Sequence[str] = ()
    error: str | None = None

    @property
    def num_learnt(self) -> int:
        """Number of tokens in the loss."""
        return 0 if self.encoded is None else sum(label != IGNORE_INDEX for label in self.encoded.labels)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields: dict[str, Any] = {"id": self.id, "where": self.where}
        if self.sample is not None:
            image = None if self.sample.image is None else str(self.sample.image)
            fields |= {"task": self.sample.task, "type": self.sample.type, "image": image}
        if self.encoded is not None:
            fields |= {
                "token_ids": self.encoded.token_ids,
                "labels": self.encoded.labels,
                "num_tokens": len(self.encoded.token_ids),
                "num_learnt": self.num_learnt,
                "is_truncated": self.encoded.is_truncated,
            }
        return fields if self.error is None else fields | {"error": self.error}


@dataclass(frozen=True, slots=True)
class DataInspection:
    """Contents of a file of samples or a mixture.

    Args:
        source: Its name.
        samples: The requested samples.
        num_records: Records of a file; None for a mixture.
        mixture: The mixture; None for a file.
    """

    source: str
    samples: Sequence[InspectedSample]
    num_records: int | None = None
    mixture: Mixture | None = None

    @property
    def num_bad(self) -> int:
        """Samples that cannot be used."""
        return sum(sample.error is not None for sample in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields: dict[str, Any] = {"source": self.source}
        if self.mixture is not None:
            fields |= {
                "table": [dataclasses.asdict(row) for row in self.mixture.table()],
                "num_samples": self.mixture.num_samples,
                "num_batches": self.mixture.num_batches,
                "batch_size": self.mixture.batch_size,
            }
        if self.num_records is not None:
            fields["num_records"] = self.num_records
        return fields | {"samples": [sample.to_dict() for sample in self.samples]}


def inspect_mixture(
    mixture: Mixture, encoder: SampleEncoder, *, epoch: int = 0, start: int = 0, count: int = 5
) -> Iterator[InspectedSample]:
    """Samples of a mixture's epoch, in its order.

    Args:
        mixture: The mixture.
        encoder: Encodes samples to tokens.
        epoch: Number of the epoch.
        start: The first sample.
        count: How many samples.
    Raises:
        DataError: An epoch has fewer samples than ``start``.
    """
    if start >= mixture.num_samples:
        raise DataError(f"start {start}: an epoch has {mixture.num_samples} samples")
    for ref, _ in zip(mixture.order(epoch, start), range(count), strict=False):
        try:
            sample = mixture.read(ref)
        except SphinxkitError as error:
            yield InspectedSample(mixture.sample_id(ref), "", error=str(error))
        else:
            yield _inspect(sample, encoder)


def inspect_file(
    file: IndexedSource, encoder: SampleEncoder, *, root: Path | None = None, start: int = 0, count: int = 5
) -> Iterator[InspectedSample]:
    """Samples of a source, in its order (those with an image first).

    Args:
        file: The source.
        encoder: Encodes samples to tokens.
        root: Folder that image paths must lie in; None: they are relative to the first file's own.
        start: The first record.
        count: How many records.
    Raises:
        DataError: The file has fewer records than ``start``.
    """
    first = file.shards[0]
    if start >= len(file):
        raise DataError(f"start {start}: {first} has {len(file)} records")
    for index in range(start, min(start + count, len(file))):
        sample_id = f"{first.stem}:{file.number(index)}"
        try:
            record, is_root = file.read(index), root is not None
            sample = read_sample(
                record.fields, sample_id, record.where, root or first.parent, is_root=is_root, trim=file.is_raw
            )
        except DataError as error:
            yield InspectedSample(sample_id, file.where(index), error=str(error))
        else:
            yield _inspect(sample, encoder)


def _inspect(sample: Sample, encoder: SampleEncoder) -> InspectedSample:
    try:
        encoded = encoder.encode(sample)
    except DataError as error:
        return InspectedSample(sample.id, sample.where, sample, error=str(error))
    return InspectedSample(sample.id, sample.where, sample, encoded, encoder.pieces(sample))
