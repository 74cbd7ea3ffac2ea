"""Inserts image tokens into the text, after its first token (beginning-of-sentence), and computes the loss.

This is the only module that knows the position of the image tokens. Logits, loss, prompts, sessions, scores and packed
samples all use it.
Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py, forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.formatters.labels import IGNORE_INDEX, next_token_targets
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.llama import LlamaModel


def join_image(text: Tensor, image: Tensor | None) -> Tensor:
    """Insert image tokens into the embeddings of a text.

    Args:
        text: Embeddings of the text, beginning-of-sentence first.
        image: Image tokens; None: the text has none.
    Shape:
        text: (..., S, D), S at least 1
        image: (..., N, D)
        return: (..., N + S, D)
    """
    if image is None:
        return text
    return torch.cat([text[..., :1, :], image, text[..., 1:, :]], dim=-2)


def num_positions(num_text_tokens: int, num_image_tokens: int) -> int:
    """Positions that the first text tokens occupy, image tokens included."""
    return num_text_tokens + num_image_tokens if num_text_tokens else 0


def num_text_tokens(num_positions: int, num_image_tokens: int) -> int:
    """Number of text tokens in the first positions; the inverse of ``num_positions``."""
    return max(0, num_positions - num_image_tokens)


def hidden_states(
    llm: LlamaModel,
    token_ids: Tensor,
    images: Tensor | None = None,
    image_rows: Sequence[int] | None = None,
    seq_lens: Sequence[int] | None = None,
    balance_losses: list[Tensor] | None = None,
) -> Tensor:
    """Hidden states that predict the next text token, at every text position.

    Args:
        llm: The language model.
        token_ids: Right-padded rows, or one row of packed samples with ``seq_lens``.
        images: Image tokens.
        image_rows: Row (or packed sample) of each image; None: one image per row, in order.
        seq_lens: Text length of each packed sample. Samples do not attend to each other.
        balance_losses: Takes the balance loss of every layer with experts.
    Shape:
        token_ids: (B, S) int64
        images: (number of images, N, D)
        return: (B, S, D); with an image, position 0 is read at the image's last token
    Raises:
        ShapeError: The rows, images and lengths are inconsistent.
        DataError: A token id is outside the vocabulary.
    """
    if token_ids.ndim != 2:
        raise ShapeError(f"token_ids: expected (B, S), got {tuple(token_ids.shape)}")
    check_vocabulary("token_ids", token_ids, llm.vocab_size)
    if seq_lens is not None:
        seq_lens = [int(length) for length in seq_lens]
        if token_ids.shape[0] != 1 or sum(seq_lens) != token_ids.shape[1] or min(seq_lens, default=0) < 1:
            raise ShapeError(
                f"packed samples: seq_lens {seq_lens} (sum {sum(seq_lens)}) must be positive and fill the single "
                f"row of token_ids {tuple(token_ids.shape)}"
            )
    num_rows = token_ids.shape[0] if seq_lens is None else len(seq_lens)
    rows = _check_rows(image_rows, num_rows, 0 if images is None else len(images))
    text: Tensor = llm.embed(to_device(token_ids, llm.embed_tokens.weight.device))
    if images is None or not rows:
        return llm.hidden_states(text, seq_lens=seq_lens, balance_losses=balance_losses)
    if seq_lens is None and rows == list(range(num_rows)):
        return llm.hidden_states(join_image(text, images), balance_losses=balance_losses)[:, images.shape[1] :]
    return _packed_hidden_states(llm, text, images, rows, seq_lens, balance_losses)


def _packed_hidden_states(
    llm: LlamaModel,
    text: Tensor,
    images: Tensor,
    rows: list[int],
    seq_lens: list[int] | None,
    balance_losses: list[Tensor] | None,
) -> Tensor:
    """As ``hidden_states`` where some rows have no image, or samples are packed: everything becomes one packed row."""
    lengths = [text.shape[1]] * text.shape[0] if seq_lens is None else seq_lens
    image_of = {row: images[image] for image, row in enumerate(rows)}
    parts, wanted, packed_lens, position = [], [], [], 0
    for row, sample in enumerate(torch.split(text.flatten(0, 1), lengths)):
        joined = join_image(sample, image_of.get(row))
        parts.append(joined)
        packed_lens.append(len(joined))
        position += len(joined)
        wanted.append(torch.arange(position - lengths[row], position, device=text.device))
    hidden = llm.hidden_states(torch.cat(parts)[None], seq_lens=packed_lens, balance_losses=balance_losses)
    return hidden[0, torch.cat(wanted)].view_as(text)


def _check_rows(image_rows: Sequence[int] | None, num_rows: int, num_images: int) -> list[int]:
    rows = list(range(num_rows if num_images else 0)) if image_rows is None else [int(row) for row in image_rows]
    if len(rows) != num_images:
        raise ShapeError(f"{num_images} images for {len(rows)} rows (image_rows {rows})")
    if len(set(rows)) != len(rows) or any(not 0 <= row < num_rows for row in rows):
        raise ShapeError(f"image_rows {rows}: each must be one of the {num_rows} rows, and none twice")
    return rows


def check_vocabulary(what: str, token_ids: Tensor, vocab_size: int) -> None:
    """Raise if an id is outside the vocabulary; ids that are on an accelerator already are not waited for.

    Args:
        what: Names the ids in the message.
        token_ids: The ids.
        vocab_size: Of the language model.
    Shape:
        token_ids: any
    Raises:
        DataError: One is; the message names it and the size.
    """
    if token_ids.device.type != "cpu" or token_ids.numel() == 0:
        return
    for value in (int(token_ids.min()), int(token_ids.max())):
        if not 0 <= value < vocab_size:
            raise DataError(f"{what}: {value} is outside the vocabulary of {vocab_size}")


class LossSums(NamedTuple):
    """Losses of a batch.

    Args:
        cross_entropy: Sum over the labelled tokens.
        num_labelled: How many those are.
        balance: Mean of the layers' balance losses, not weighted; None for a model without experts or in eval mode.
    """

    cross_entropy: Tensor
    num_labelled: Tensor
    balance: Tensor | None = None


def cut_unlabelled(token_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns on the right in which no row has a label; 3 are kept if there is none at all.

    Args:
        token_ids: Padded rows.
        labels: Aligned to them.
    Shape:
        token_ids, labels: (B, S)
        return: two of (B, S'), S' <= S
    Source: LLaMA2-Accessory, accessory/model/meta.py, MetaModel.forward.
    """
    columns = (labels != IGNORE_INDEX).any(0).nonzero()
    width = int(columns[-1]) + 1 if len(columns) else 3
    return token_ids[:, :width], labels[:, :width]


def loss_sums(
    llm: LlamaModel, hidden: Tensor, labels: Tensor, seq_lens: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy of the labelled tokens, and how many they are.

    Args:
        llm: Its ``lm_head`` is applied only where there is a label.
        hidden: From ``hidden_states``.
        labels: Aligned to the tokens; ``IGNORE_INDEX`` where nothing is learnt.
        seq_lens: Of packed samples.
    Shape:
        hidden: (B, S, D)
        labels: (B, S)
        return: two scalars
    Raises:
        DataError: A label is outside the vocabulary.
    """
    targets = to_device(next_token_targets(labels, seq_lens), hidden.device)
    is_learnt = targets != IGNORE_INDEX
    places = is_learnt.nonzero(as_tuple=True)  # the only wait for the device
    learnt, count = targets[places], is_learnt.sum()
    check_vocabulary("labels", learnt, llm.vocab_size)
    if not len(learnt):
        return llm.lm_head(hidden[:, :1]).float().sum() * 0.0, count
    logits = llm.lm_head(hidden[:, :-1][places])
    return F.cross_entropy(logits.float(), learnt, reduction="sum"), count
