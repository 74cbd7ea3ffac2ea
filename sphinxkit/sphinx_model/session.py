"""A conversation about one image: each question costs its own tokens and nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation import ContinuousBatch, Row, Sampling, copy_rows
from sphinxkit.sphinx_model.prompts import encode_each
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.llama import KVCache
    from sphinxkit.sphinx_model.model import SphinxModel
    from sphinxkit.sphinx_model.prompts import ImageInput

CAPACITY_MULTIPLE = 256  # tokens by which the cache grows; our choice
EMPTY_ANSWER = "(no answer)"  # stands in the conversation where the model wrote nothing: templates refuse empty turns


class ChatSession:
    """Made by ``SphinxModel.session``; answers as ``SphinxModel.chat`` does on the whole conversation.

    Every turn the whole conversation is tokenised, as ``chat`` does it. The KV cache is kept from turn to turn: what it
    holds is good up to the first token that differs, and only what follows is read. The image is encoded once, when
    the session begins, and read with the first question.

    Args:
        model: With a tokenizer and a conversation template.
        image: What the conversation is about.
        system: Replaces the template's system text.
        num_draft_tokens: Longest draft of prompt lookup; see ``generation.Decoder``.
    Raises:
        DataError: No template, no tokenizer, or an image that cannot be read.
    """

    def __init__(
        self,
        model: SphinxModel,
        image: ImageInput | None = None,
        system: str | None = None,
        num_draft_tokens: int | None = None,
    ) -> None:
        model.require_tokenizer()
        self._model = model
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._speculate = num_draft_tokens
        self._visual: Tensor | None = None
        if image is not None:
            [self._visual] = encode_each(model, [image])
        self._num_slots = 0 if self._visual is None else len(self._visual)
        self._cache: KVCache | None = None
        self._held: list[int] = []  # the text tokens that the cache holds; the image stands behind the first
        self.messages = list(self._opening)
        """The conversation so far."""
        self.num_prefilled = 0
        """Positions of prompts that were read, image tokens included, in all turns."""
        self.num_reused = 0
        """Positions of prompts that were in the cache already, in all turns."""
        model.chat_prompt([*self._opening, {"role": "user", "content": "?"}])  # no template: say so now

    def reset(self) -> None:
        """Forget the conversation; the image and what is common to every conversation stay read."""
        self.messages = list(self._opening)

    def ask(
        self,
        question: str,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Answer a question; both become part of the conversation.

        Args:
            question: The user's words.
            max_new_tokens: Of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            seed: Of the sampling.

        Raises:
            DataError: An empty question, or a conversation that fills the context; then nothing has changed.
        """
        for _ in self.stream(question, max_new_tokens, temperature, top_p, seed):
            pass
        answer = self.messages[-1]["content"]
        return "" if answer == EMPTY_ANSWER else answer

    def stream(
        self,
        question: str,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """As ``ask``, piece by piece. The turn becomes part of the conversation once the answer is complete."""
        messages = [*self.messages, {"role": "user", "content": question}]
        text, stop = self._model.chat_prompt(messages)
        sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop), seed)
        tokenizer, limit = self._model.require_tokenizer(), self._model.llm.max_seq_len
        ids = tokenizer.encode(text, bos=True)
        position = len(ids) + self._num_slots
        if position >= limit:
            raise DataError(
                f"the conversation takes {position} positions, {self._num_slots} of them the image's, which leaves no "
                f"room in the context of {limit}; begin anew with reset()"
            )
        row = Row(
            tokenizer, sampling, min(max_new_tokens, limit - position), prompt_ids=ids, num_draft_tokens=self._speculate
        )
        embeds, start = self._continue(ids)
        cache = self._make_room(position + row.budget, start)
        batch = ContinuousBatch(self._model.llm, cache=cache)
        batch.add(row, embeds, start)
        try:
            while len(batch):
                batch.step()
                piece = row.take()
                if piece:
                    yield piece
        finally:  # also when the caller stops listening
            self._held = [*ids, *row.written][: max(0, int(cache.lengths[0]) - self._num_slots)]
        self.num_prefilled += len(embeds)
        self.num_reused += start
        answer = row.result().text.strip() or EMPTY_ANSWER
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _continue(self, ids: Sequence[int]) -> tuple[Tensor, int]:
        """What has to be read, embedded, and how many positions before it the cache holds."""
        common = 0
        while common < min(len(self._held), len(ids) - 1) and self._held[common] == ids[common]:
            common += 1
        with torch.no_grad():
            text = self._model.llm.embed(to_device(ids[common:], self._model.device))
            if common == 0 and self._visual is not None:
                return torch.cat([text[:1], self._visual, text[1:]]), 0
        return text, common + self._num_slots if common else 0

    def _make_room(self, capacity: int, start: int) -> KVCache:
        """The cache, with room for the turn, cut down to its first ``start`` positions."""
        llm = self._model.llm
        if self._cache is None or self._cache.max_seq_len < capacity:
            multiple = CAPACITY_MULTIPLE
            grown = llm.make_cache(1, min((capacity + multiple - 1) // multiple * multiple, llm.max_seq_len))
            if self._cache is not None:
                copy_rows(self._cache, [0], grown, [0], start)
            self._cache = grown
        self._cache.lengths.fill_(start)
        return self._cache
