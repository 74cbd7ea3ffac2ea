"""Visual tokens among words: hidden states of text that has images, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.sphinx_model.model import SphinxModel

IGNORE_INDEX = -100  # torch's own default for cross entropy


def hidden_states(
    model: SphinxModel,
    token_ids: Tensor,
    pixels: Tensor | None,
    image_rows: Sequence[int] | None,
    seq_lens: Sequence[int] | None,
) -> Tensor:
    """Hidden states (B, S, D) that predict the next text token; the arguments are those of ``SphinxModel.forward``."""
    llm = model.llm
    if token_ids.ndim != 2:
        raise ShapeError(f"token_ids: expected (B, S), got {tuple(token_ids.shape)}")
    check_vocabulary("token_ids", token_ids, llm.vocab_size)
    token_ids = to_device(token_ids, model.device)
    if seq_lens is not None:
        seq_lens = [int(length) for length in seq_lens]
        if token_ids.shape[0] != 1 or sum(seq_lens) != token_ids.shape[1] or min(seq_lens, default=0) < 1:
            raise ShapeError(
                f"packed samples: seq_lens {seq_lens} (sum {sum(seq_lens)}) must be positive and fill the single "
                f"row of token_ids {tuple(token_ids.shape)}"
            )
    text: Tensor = llm.embed(token_ids)
    if pixels is None or len(pixels) == 0:
        if image_rows:
            raise ShapeError(f"image_rows {list(image_rows)} without pixels")
        return llm.hidden_states(text, seq_lens=seq_lens)
    num_rows = token_ids.shape[0] if seq_lens is None else len(seq_lens)
    rows = _check_rows(image_rows, num_rows, len(pixels))
    images = model.encode_images(pixels)
    if seq_lens is None and rows == list(range(num_rows)):
        joined = torch.cat([text[:, :1], images, text[:, 1:]], dim=1)
        return llm.hidden_states(joined)[:, images.shape[1] :]
    return _hidden_of_some(model, text, images, rows, seq_lens)


def check_vocabulary(what: str, token_ids: Tensor, vocab_size: int) -> None:
    """Raise if an id is outside the vocabulary; ids that are on an accelerator already are not waited for.

    Raises:
        DataError: One is; the message names it and the size.
    """
    if token_ids.device.type != "cpu" or token_ids.numel() == 0:
        return
    for value in (int(token_ids.min()), int(token_ids.max())):
        if not 0 <= value < vocab_size:
            raise DataError(f"{what}: {value} is outside the vocabulary of {vocab_size}")


def _hidden_of_some(
    model: SphinxModel, text: Tensor, images: Tensor, rows: list[int], seq_lens: list[int] | None
) -> Tensor:
    """As ``hidden_states`` when some rows have no image, or samples are packed: everything becomes one packed row."""
    num_slots = images.shape[1]
    lengths = [text.shape[1]] * text.shape[0] if seq_lens is None else seq_lens
    image_of = {row: image for image, row in enumerate(rows)}
    parts, wanted, packed_lens, position = [], [], [], 0
    for row, sample in enumerate(torch.split(text.flatten(0, 1), lengths)):
        if row in image_of:
            parts += [sample[:1], images[image_of[row]], sample[1:]]
            skipped = num_slots
        else:
            parts.append(sample)
            skipped = 0
        wanted.append(torch.arange(position + skipped, position + skipped + lengths[row], device=text.device))
        packed_lens.append(lengths[row] + skipped)
        position += lengths[row] + skipped
    hidden = model.llm.hidden_states(torch.cat(parts)[None], seq_lens=packed_lens)
    return hidden[0, torch.cat(wanted)].view_as(text)


def loss_sums(
    model: SphinxModel, hidden: Tensor, labels: Tensor, seq_lens: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy of the labelled tokens, and how many they are.

    Args:
        model: Its ``lm_head`` is applied where there is a label and nowhere else.
        hidden: From ``hidden_states``.
        labels: Aligned to the tokens; ``IGNORE_INDEX`` where nothing is to be learnt.
        seq_lens: Of packed samples.
    Shape:
        hidden: (B, S, D)
        labels: (B, S)
        return: two scalars
    """
    hidden = hidden[:, :-1]
    targets = to_device(labels[:, 1:], model.device)
    if seq_lens is not None:  # a sample's first token is not the continuation of the sample before it
        starts = to_device(seq_lens[:-1], model.device, torch.long).cumsum(0) - 1
        targets = targets.index_fill(1, starts, IGNORE_INDEX)
    is_learnt = targets != IGNORE_INDEX
    places = is_learnt.nonzero(as_tuple=True)  # the only wait for the device
    learnt, count = targets[places], is_learnt.sum()
    check_vocabulary("labels", learnt, model.llm.vocab_size)
    if not len(learnt):
        return model.llm.lm_head(hidden[:, :1]).float().sum() * 0.0, count
    logits = model.llm.lm_head(hidden[places])
    return F.cross_entropy(logits.float(), learnt, reduction="sum"), count


def _check_rows(image_rows: Sequence[int] | None, num_rows: int, num_images: int) -> list[int]:
    rows = list(range(num_rows)) if image_rows is None else [int(row) for row in image_rows]
    if len(rows) != num_images:
        raise ShapeError(f"{num_images} images for {len(rows)} rows (image_rows {rows})")
    if len(set(rows)) != len(rows) or any(not 0 <= row < num_rows for row in rows):
        raise ShapeError(f"image_rows {rows}: each must be one of the {num_rows} rows, and none twice")
    return rows
