"""Requests through a running batch: a finished request's place is taken by the next one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sphinxkit.batch_inference.requests import Request
from sphinxkit.errors import DataError
from sphinxkit.generation import ContinuousBatch, GeneratedSequence, Generation
from sphinxkit.vision import MAX_VIEWS

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

# Our choices: the cache grows by this many tokens; so many images' tokens are kept for requests that ask again.
CAPACITY_MULTIPLE = 128
NUM_KEPT_IMAGES = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Args:
        request: What was asked.
        generation: The answer; None where there is none.
        error: Why there is none.
    """

    request: Request
    generation: Generation | None = None
    error: str | None = None


class _Images:
    """Opens and preprocesses the images of coming requests in threads; keeps the tokens of the last ones."""

    def __init__(self, model: SphinxModel, pool: ThreadPoolExecutor) -> None:
        self._model = model
        self._pool = pool
        self._loading: dict[Path, Future[Tensor]] = {}
        self._tokens: OrderedDict[Path, Tensor] = OrderedDict()

    def expect(self, path: Path | None) -> None:
        """Begin to load an image that will be asked for."""
        if path is not None and path not in self._loading and path not in self._tokens:
            self._loading[path] = self._pool.submit(self._model.preprocess, path)

    def pixels(self, path: Path) -> Tensor | None:
        """Pixels (1, 3, S, S); None where the tokens are there. DataError where the image cannot be used."""
        if path in self._tokens:
            self._tokens.move_to_end(path)
            return None
        loading = self._loading.pop(path, None)
        return self._model.preprocess(path) if loading is None else loading.result()

    @torch.no_grad()
    def encode(self, pixels: dict[Path, Tensor], wanted: Iterable[Path]) -> dict[Path, Tensor]:
        """Image tokens of images: those whose pixels are given are encoded together.

        Shape:
            pixels: (1, 3, S, S) each
            return: (N_img, D) each
        """
        if pixels:
            made = self._model.encode_images(torch.cat(list(pixels.values())), max_views=MAX_VIEWS)
            self._tokens |= zip(pixels, made.unbind(), strict=True)
        found = {path: self._tokens[path] for path in wanted}
        while len(self._tokens) > NUM_KEPT_IMAGES:
            self._tokens.popitem(last=False)
        return found


def answer_requests(
    model: SphinxModel,
    requests: Iterable[Request],
    *,
    batch_size: int = 8,
    num_workers: int = 2,
    num_draft_tokens: int | None = None,
    truncate: Literal["left"] | None = None,
) -> Iterator[Answer]:
    """Answer requests by continuous batching, in the order in which the answers are complete.

    At most ``batch_size`` sequences are decoded together. When one is finished, the next request is read in and takes
    its place, while the others keep theirs. Images are opened and preprocessed in threads, a batch ahead of the model.
    Every answer is what ``SphinxModel.generate`` gives for the request alone (up to rounding, which only decides ties).

    Args:
        model: With a tokenizer.
        requests: Taken as they are needed.
        batch_size: Sequences at once.
        num_workers: Threads that load images.
        num_draft_tokens: Drafts of prompt lookup for greedy requests; see ``generation.Decoder``.
        truncate: See ``SphinxModel.generate``.
    Raises:
        DataError: ``batch_size`` or ``num_workers`` is not positive, or there is no tokenizer. What is wrong with a
            single request stands in its answer.
    """
    for name, value in (("batch_size", batch_size), ("num_workers", num_workers)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    tokenizer = model.require_tokenizer()
    source = iter(requests)
    upcoming: deque[Request] = deque()
    batch = ContinuousBatch(model.llm, tokenizer, end_ids=model.end_ids, capacity_multiple=CAPACITY_MULTIPLE)
    asked: dict[GeneratedSequence, Request] = {}
    pool = ThreadPoolExecutor(num_workers)
    try:
        images = _Images(model, pool)
        while True:
            newcomers: list[Request] = []
            while len(batch) + len(newcomers) < batch_size:
                _look_ahead(source, upcoming, images, 1 + batch_size)
                if not upcoming:
                    break
                newcomers.append(upcoming.popleft())
            _look_ahead(source, upcoming, images, batch_size)
            yield from _admit(model, newcomers, images, batch, asked, num_draft_tokens, truncate)
            if len(batch):
                for sequence in batch.step():
                    yield _answer_of(asked.pop(sequence), sequence)
            elif not upcoming:
                return
    finally:
        pool.shutdown(cancel_futures=True)


def _answer_of(request: Request, sequence: GeneratedSequence) -> Answer:
    try:
        return Answer(request, sequence.result())
    except DataError as error:
        return Answer(request, error=str(error))


def _look_ahead(source: Iterator[Request], upcoming: deque[Request], images: _Images, count: int) -> None:
    while len(upcoming) < count and (request := next(source, None)) is not None:
        upcoming.append(request)
        images.expect(request.image)


def _admit(
    model: SphinxModel,
    newcomers: list[Request],
    images: _Images,
    batch: ContinuousBatch,
    asked: dict[GeneratedSequence, Request],
    num_draft_tokens: int | None,
    truncate: Literal["left"] | None,
) -> Iterator[Answer]:
    """Encode the newcomers' images together and let them join; yields those that cannot."""
    ready: list[Request] = []
    pixels: dict[Path, Tensor] = {}
    for request in newcomers:
        try:
            if request.image is not None and request.image not in pixels:
                found = images.pixels(request.image)
                if found is not None:
                    pixels[request.image] = found
            ready.append(request)
        except DataError as error:
            yield Answer(request, error=str(error))
    encoded = images.encode(pixels, {request.image for request in ready if request.image is not None})
    for request in ready:
        image = None if request.image is None else encoded[request.image]
        try:
            [prompt] = model.embed_prompts([request.prompt], [image], truncate, request.sampling.max_new_tokens)
            sequence = batch.add(
                prompt.embeds,
                request.sampling,
                prompt_ids=prompt.token_ids,
                num_draft_tokens=None if request.sampling.temperature > 0 else num_draft_tokens,
            )
        except DataError as error:
            yield Answer(request, error=str(error))
            continue
        asked[sequence] = request
