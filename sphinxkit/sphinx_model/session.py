"""Chat session about one image; keeps the KV cache between turns."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import TaskQuestion
from sphinxkit.generation import ContinuousBatch, Sampling, check_context
from sphinxkit.sphinx_model.images import ImageInput, encode_each
from sphinxkit.sphinx_model.multimodal import join_image, num_positions, num_text_tokens
from sphinxkit.sphinx_model.parts import ModelParts
from sphinxkit.sphinx_model.prompts import encode_prompt
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.llama import KVCache

CAPACITY_MULTIPLE = 256  # tokens by which the cache grows; our choice
EMPTY_ANSWER = "(no answer)"  # stands in the conversation where the model wrote nothing: templates refuse empty turns


class ChatSession:
    """Chat session; keeps the KV cache between turns. Made by ``SphinxModel.session``.

    Answers equal those of ``SphinxModel.chat`` on the whole conversation. Every turn tokenises the whole conversation.
    The KV cache is reused up to the first token that differs, and only the rest is read. The image is encoded once,
    when the session begins, and read with the first question.

    Args:
        model: Must have a tokenizer and a conversation template.
        image: The image to discuss.
        system: Replaces the template's system text.
        num_draft_tokens: Longest draft of prompt lookup; see ``generation.Decoder``.
    Raises:
        DataError: The model has no template or tokenizer, or the image cannot be read.
    """

    def __init__(
        self,
        model: ModelParts,
        image: ImageInput | None = None,
        system: str | None = None,
        num_draft_tokens: int | None = None,
    ) -> None:
        model.require_tokenizer()
        self._model = model
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._num_draft_tokens = num_draft_tokens
        self._image: Tensor | None = None
        if image is not None:
            [self._image] = encode_each(model, [image])
        self._num_image_tokens = 0 if self._image is None else len(self._image)
        self._cache: KVCache | None = None
        self._lock = threading.Lock()
        self._cached_ids: list[int] = []  # the text tokens that the cache holds
        self.messages = list(self._opening)
        """The conversation so far."""
        self.confidence: float | None = None
        """The last answer's confidence; see ``generation.Generation``."""
        self.num_prefilled = 0
        """Positions of prompts that were read, image tokens included, in all turns."""
        self.num_reused = 0
        """Positions of prompts that were in the cache already, in all turns."""
        model.chat_prompt([*self._opening, {"role": "user", "content": "?"}])  # no template: say so now

    def reset(self) -> None:
        """Clear the conversation. The cache keeps the image and the tokens that every conversation shares."""
        self.messages = list(self._opening)

    def ask(
        self,
        question: str | TaskQuestion,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Answer a question; both become part of the conversation.

        Args:
            question: The user's text, or a task's question (``formatters.tasks.make_question``).
            max_new_tokens: Maximum length of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            seed: Random seed for sampling.

        Raises:
            DataError: The question is empty, the conversation fills the context, or another answer is in progress. The
                session is unchanged then.
        """
        turn = self._turn(question, Sampling(max_new_tokens, temperature, top_p, seed=seed))
        while True:
            try:
                next(turn)
            except StopIteration as end:
                return str(end.value)

    def stream(
        self,
        question: str | TaskQuestion,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer in pieces; see ``ask``. The turn joins the conversation once the answer is complete."""
        yield from self._turn(question, Sampling(max_new_tokens, temperature, top_p, seed=seed))

    def _turn(self, question: str | TaskQuestion, sampling: Sampling) -> Generator[str, None, str]:
        """Yields the answer's pieces and returns the answer; no other turn may begin meanwhile."""
        if not self._lock.acquire(blocking=False):
            raise DataError("the session is answering another question: ask one at a time, or make another session")
        try:
            return (yield from self._answer(question, sampling))
        finally:
            self._lock.release()

    def _answer(self, question: str | TaskQuestion, sampling: Sampling) -> Generator[str, None, str]:
        words, answer_start = (
            (question.text, question.task.answer_start.strip())
            if isinstance(question, TaskQuestion)
            else (question, "")
        )
        messages = [*self.messages, {"role": "user", "content": words}]
        text, stop = self._model.chat_prompt(messages, answer_start)
        sampling = dataclasses.replace(sampling, stop=stop)
        tokenizer = self._model.require_tokenizer()
        ids = encode_prompt(self._model, text)
        positions = num_positions(len(ids), self._num_image_tokens)
        limit = self._model.llm.max_seq_len
        try:
            check_context(
                "the conversation", positions, limit, num_new_tokens=1, num_image_tokens=self._num_image_tokens
            )
        except DataError as error:
            raise DataError(f"{error}; start a new one with reset()") from error
        embeds, num_cached = self._uncached(ids)
        if self._cache is not None:
            self._cache.lengths.fill_(num_cached)
            self._cached_ids = ids[: num_text_tokens(num_cached, self._num_image_tokens)]
        batch = ContinuousBatch(
            self._model.llm,
            tokenizer,
            end_ids=self._model.end_ids,
            cache=self._cache,
            capacity_multiple=CAPACITY_MULTIPLE,
        )
        sequence = batch.add(
            embeds, sampling, prompt_ids=ids, num_draft_tokens=self._num_draft_tokens, num_cached=num_cached
        )
        try:
            while len(batch):
                batch.step()
                piece = sequence.new_text()
                if piece:
                    yield piece
        finally:  # also when the caller stops listening
            self._cache = batch.cache
            held = 0 if batch.cache is None else int(batch.cache.lengths[0])
            self._cached_ids = [*ids, *sequence.generated_ids][: num_text_tokens(held, self._num_image_tokens)]
        self.num_prefilled += len(embeds)
        self.num_reused += num_cached
        result = sequence.result()
        answer, self.confidence = result.text.strip(), result.confidence
        said = f"{answer_start} {answer}".strip() or EMPTY_ANSWER
        self.messages = [*messages, {"role": "assistant", "content": said}]
        return answer

    def _uncached(self, ids: Sequence[int]) -> tuple[Tensor, int]:
        """Embeddings of what has to be read, and how many positions before it the cache holds."""
        common = 0
        while common < min(len(self._cached_ids), len(ids) - 1) and self._cached_ids[common] == ids[common]:
            common += 1
        with torch.no_grad():
            text = self._model.llm.embed(to_device(ids[common:], self._model.device))
            return (text if common else join_image(text, self._image)), num_positions(common, self._num_image_tokens)
