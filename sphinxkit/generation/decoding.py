"""Decode a fixed set of prompts to the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sphinxkit.generation.continuous_batching import ContinuousBatch
from sphinxkit.generation.sampling import Sampling
from sphinxkit.generation.sequence import GeneratedSequence, Generation

if TYPE_CHECKING:
    from sphinxkit.llama import LlamaModel
    from sphinxkit.tokenizer import Tokenizer


class Decoder:
    """Decodes a batch of embedded prompts. The first ``step`` reads the prompts; each later step generates tokens.

    Finished sequences leave the batch and cost nothing.

    Args:
        llm: The language model.
        tokenizer: Decodes tokens to text, in which stop strings are found.
        prompts: Embedded prompts, image tokens included.
        sampling: Sampling options, shared or one per prompt.
        num_draft_tokens: Maximum draft length of prompt lookup (greedy only). The draft is the text that followed the
            same words earlier in the sequence; the model verifies it in the pass of the next token. Answers equal plain
            greedy decoding, up to ties within rounding. None: off.
        token_ids: Token ids of each prompt's text, searched for drafts.
        end_ids: See ``ContinuousBatch``.
        passes_per_step: See ``ContinuousBatch``.

    Shape:
        prompts: one (S_i, D) per row
    Raises:
        DataError: A prompt leaves no room for an answer in the model's context; ``num_draft_tokens`` with sampling; or
            ``passes_per_step`` is not positive.
    """

    def __init__(
        self,
        llm: LlamaModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Tensor],
        sampling: Sampling | Sequence[Sampling],
        *,
        num_draft_tokens: int | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
        end_ids: Sequence[int] = (),
        passes_per_step: int | None = None,
    ) -> None:
        self.sequences: list[GeneratedSequence] = []
        self._batch = ContinuousBatch(llm, tokenizer, end_ids=end_ids, passes_per_step=passes_per_step)
        for index, prompt in enumerate(prompts):
            own = sampling if isinstance(sampling, Sampling) else sampling[index]
            ids = token_ids[index] if token_ids is not None else ()
            self.sequences.append(
                self._batch.add(prompt, own, prompt_ids=ids, num_draft_tokens=num_draft_tokens, name=f"prompt {index}")
            )

    @property
    def is_done(self) -> bool:
        """Whether every sequence has finished."""
        return not len(self._batch)

    def step(self) -> None:
        """Generate at least one token for every unfinished sequence."""
        self._batch.step()

    def run(self) -> list[Generation]:
        """Decode until every sequence has finished."""
        while not self.is_done:
            self.step()
        return [sequence.result() for sequence in self.sequences]

    def stream(self) -> Iterator[str]:
        """Decode a single prompt; yield text as soon as it is certain."""
        while not self.is_done:
            self.step()
            piece = self.sequences[0].new_text()
            if piece:
                yield piece
        self.sequences[0].result()  # raises where the logits were not finite
