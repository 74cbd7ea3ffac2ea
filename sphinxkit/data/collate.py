"""Collates samples to tensors: encoded, then packed into one row or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphinxkit.data.conversations import OverLength, TextTokenizer, encode_sample
from sphinxkit.data.samples import Sample
from sphinxkit.errors import DataError
from sphinxkit.formatters import IGNORE_INDEX, ConversationTemplate, next_token_targets


@dataclass(frozen=True, slots=True)
class Example:
    """A sample as model input.

    Args:
        id: Sample id.
        token_ids: Token ids of the text.
        labels: Aligned to ``token_ids``; -100 where there is no loss.
        pixels: (3, S, S) float32, or None.
        is_truncated: Whether the text was truncated.
    """

    id: str
    token_ids: list[int]
    labels: list[int]
    pixels: Tensor | None = None
    is_truncated: bool = False

    def length(self, num_image_tokens: int) -> int:
        """Number of positions, image tokens included."""
        return len(self.token_ids) + (0 if self.pixels is None else num_image_tokens)


def split_text(sample_id: str, token_ids: Sequence[int], labels: Sequence[int], size: int) -> list[Example]:
    """Examples of at most ``size`` tokens that together predict every token of a text once.

    Each begins with the token that the one before ends with, as an example's first token is never predicted.

    Args:
        sample_id: Id of each.
        token_ids: Of the whole text.
        labels: Aligned to ``token_ids``.
        size: At least 2.
    """
    starts = range(0, len(token_ids) - 1, size - 1)
    return [Example(sample_id, list(token_ids[s : s + size]), list(labels[s : s + size])) for s in starts]


@dataclass(frozen=True, slots=True)
class ExampleMaker:
    """Turns samples into examples; the transform of a ``MixtureLoader``. It can be pickled for worker processes.

    Args:
        template: Conversation template.
        tokenizer: Tokenizer that returns character offsets.
        image_size: Side of the preprocessed image in pixels; 0: text-only model, which raises an error for images.
        max_tokens: Maximum length of a row, image tokens included.
        num_image_tokens: Tokens of one image.
        over_length: Policy for longer samples; see ``conversations.encode_sample``.
    """

    template: ConversationTemplate
    tokenizer: TextTokenizer
    image_size: int
    max_tokens: int
    num_image_tokens: int
    over_length: OverLength = "error"

    def __call__(self, sample: Sample) -> Example | list[Example]:
        """Encode a sample and preprocess its image; a long text that continues becomes several examples.

        Raises:
            OverLengthError: The sample is too long and the policy is ``skip``.
            DataError: The image cannot be read or the model is text-only, no token has a label, or the sample is too
                long.
        """
        from sphinxkit.tilers import preprocess

        has_image = sample.type == "image-text"
        if has_image and not self.image_size:
            raise DataError(f"sample {sample.id}: it has an image, but the model has no vision tower")
        room = self.max_tokens - (self.num_image_tokens if has_image else 0)
        if room < 2:
            raise DataError(
                f"sample {sample.id}: an image takes {self.num_image_tokens} of the {self.max_tokens} tokens of a row; "
                "nothing is left for text"
            )
        encoded = encode_sample(sample, self.template, self.tokenizer, room, self.over_length)
        if len(encoded.token_ids) > room:
            return split_text(sample.id, encoded.token_ids, encoded.labels, room)
        pixels = preprocess(sample.open_image(), self.image_size)[0] if has_image else None
        return Example(sample.id, list(encoded.token_ids), list(encoded.labels), pixels, encoded.is_truncated)


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of ``SphinxModel.loss``, with the ids of its samples.

    Args:
        token_ids: One row of packed samples, or one right-padded row per sample.
        labels: Aligned to ``token_ids``.
        ids: Sample ids, in order.
        pixels: Images in the samples' order; None without images.
        image_rows: Sample index of each image.
        seq_lens: Text lengths of the packed samples; None for padded rows.
        num_text_tokens: Number of text tokens without padding.
    Shape:
        token_ids, labels: (1, sum of lengths) or (B, S) int64
        pixels: (number of images, 3, S_img, S_img) float32
    """

    token_ids: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    pixels: Tensor | None = None
    image_rows: tuple[int, ...] = ()
    seq_lens: tuple[int, ...] | None = None
    num_text_tokens: int = 0

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.image_rows)

    @property
    def num_learnt(self) -> int:
        """Number of tokens in the loss. A sample's first token is never predicted and not counted."""
        return int((next_token_targets(self.labels, self.seq_lens) != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device."""
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=True)
        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pixels=pixels,
        )


def _images(examples: Sequence[Example]) -> tuple[Tensor | None, tuple[int, ...]]:
    found = {row: example.pixels for row, example in enumerate(examples) if example.pixels is not None}
    return (torch.stack(list(found.values())) if found else None), tuple(found)


def collate_packed(examples: Sequence[Example]) -> Batch:
    """Pack several samples into one row without padding. Samples do not attend to each other.

    Args:
        examples: One or more.
    Raises:
        DataError: There are none.
    """
    if not examples:
        raise DataError("collate: there are no samples")
    pixels, image_rows = _images(examples)
    lengths = tuple(len(example.token_ids) for example in examples)
    return Batch(
        token_ids=torch.tensor([[token for example in examples for token in example.token_ids]]),
        labels=torch.tensor([[label for example in examples for label in example.labels]]),
        ids=tuple(example.id for example in examples),
        pixels=pixels,
        image_rows=image_rows,
        seq_lens=lengths,
        num_text_tokens=sum(lengths),
    )


def collate_padded(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad samples on the right to the longest, one row each.

    Args:
        examples: One or more.
        pad_id: Token id of the padding, which has no loss and is not attended to.
    Raises:
        DataError: There are none.
    """
    if not examples:
        raise DataError("collate: there are no samples")
    pixels, image_rows = _images(examples)
    width = max(len(example.token_ids) for example in examples)
    return Batch(
        token_ids=torch.tensor([ex.token_ids + [pad_id] * (width - len(ex.token_ids)) for ex in examples]),
        labels=torch.tensor([ex.labels + [IGNORE_INDEX] * (width - len(ex.labels)) for ex in examples]),
        ids=tuple(example.id for example in examples),
        pixels=pixels,
        image_rows=image_rows,
        num_text_tokens=sum(len(example.token_ids) for example in examples),
    )
