"""A given set of prompts, decoded to the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation.batch import ContinuousBatch
from sphinxkit.generation.rows import Generation, Row
from sphinxkit.generation.sampling import Sampling

if TYPE_CHECKING:
    from sphinxkit.llama import LlamaModel
    from sphinxkit.tokenizer import Tokenizer


class Decoder:
    """Decodes a batch of embedded prompts; the first ``step`` reads them, every further one gives tokens.

    Rows that are finished leave the batch, so that they cost nothing.

    Args:
        llm: The language model.
        tokenizer: Turns tokens into text, which decides where a stop string is.
        prompts: Embedded prompts, image tokens included.
        sampling: For all rows; row i draws from ``seed + i``.
        num_draft_tokens: Longest draft of prompt-lookup decoding (greedy only): what followed the same words earlier
            in the row is read along with the next token, and kept as far as the model would have written it. The
            answers are those of plain greedy decoding, up to ties within rounding. None: off.
        token_ids: Each prompt's text, where drafts may come from.
        chunk: Passes between two waits for the device; see ``ContinuousBatch``.

    Shape:
        prompts: one (S_i, D) per row
    Raises:
        DataError: A prompt leaves no room for an answer in the model's context; ``num_draft_tokens`` with sampling; or
            ``chunk`` is not positive.
    """

    def __init__(
        self,
        llm: LlamaModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        *,
        num_draft_tokens: int | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
        chunk: int | None = None,
    ) -> None:
        for index, prompt in enumerate(prompts):
            if len(prompt) >= llm.max_seq_len:
                raise DataError(
                    f"prompt {index} takes {len(prompt)} positions, image included, which leaves no room in the "
                    f"context of {llm.max_seq_len}; shorten it, or pass truncate='left'"
                )
        self.rows: list[Row] = []
        self._batch = ContinuousBatch(llm, chunk=chunk)
        for index, prompt in enumerate(prompts):
            own = sampling
            if sampling.seed is not None:
                own = dataclasses.replace(sampling, seed=sampling.seed + index)
            budget = min(sampling.max_new_tokens, llm.max_seq_len - len(prompt))
            ids = token_ids[index] if token_ids is not None else ()
            row = Row(tokenizer, own, budget, prompt_ids=ids, num_draft_tokens=num_draft_tokens)
            self.rows.append(row)
            self._batch.add(row, prompt)

    @property
    def is_done(self) -> bool:
        """Whether every row has finished."""
        return not len(self._batch)

    def step(self) -> None:
        """At least one more token for every unfinished row."""
        self._batch.step()

    def run(self) -> list[Generation]:
        """Decode until every row has finished."""
        while not self.is_done:
            self.step()
        return [row.result() for row in self.rows]

    def stream(self) -> Iterator[str]:
        """Decode a single row, yielding text as soon as it is certain."""
        while not self.is_done:
            self.step()
            piece = self.rows[0].take()
            if piece:
                yield piece
