"""Continuous batching of requests: a new request takes the place of a finished one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sphinxkit.batch_inference.requests import Request
from sphinxkit.errors import DataError, ShapeError, SphinxkitError
from sphinxkit.generation import ContinuousBatch, GeneratedSequence, Generation
from sphinxkit.sphinx_model.images import ImageInput, image_pixels
from sphinxkit.vision import MAX_VIEWS

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

# Our choices: the cache grows by this many tokens; so many images' tokens are kept for requests that ask again.
CAPACITY_MULTIPLE = 128
NUM_KEPT_IMAGES = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """Outcome of a request.

    Args:
        request: The request.
        generation: The answer; None after an error.
        error: Why there is no answer.
    """

    request: Request
    generation: Generation | None = None
    error: str | None = None


class _Images:
    """Opens and preprocesses the images of coming requests in threads; keeps the tokens of the last files."""

    def __init__(self, model: SphinxModel, pool: ThreadPoolExecutor) -> None:
        self._model = model
        self._pool = pool
        self._loading: dict[Hashable, Future[Tensor]] = {}
        self._tokens: OrderedDict[Hashable, Tensor] = OrderedDict()

    def expect(self, image: ImageInput | None) -> None:
        """Start loading an image."""
        key = _key(image)
        if image is not None and key not in self._loading and key not in self._tokens:
            self._loading[key] = self._pool.submit(self._load, image)

    def _load(self, image: ImageInput) -> Tensor:
        if isinstance(image, Tensor) and image.ndim == 2:
            return image
        return image_pixels(self._model, [image])

    @torch.no_grad()
    def encode(self, images: Iterable[ImageInput]) -> dict[Hashable, Tensor | SphinxkitError]:
        """Image tokens (N_img, D) or the error of each image; new images are encoded together."""
        found: dict[Hashable, Tensor | SphinxkitError] = {}
        pixels: dict[Hashable, Tensor] = {}
        files: set[Hashable] = set()
        for image in images:
            key = _key(image)
            if key in found or key in pixels:
                continue
            if isinstance(image, str | Path):
                files.add(key)
            if key in self._tokens:
                self._tokens.move_to_end(key)
                found[key] = self._tokens[key]
                continue
            loading = self._loading.pop(key, None)
            try:
                loaded = self._load(image) if loading is None else loading.result()
            except (DataError, ShapeError) as error:
                found[key] = error
                continue
            if loaded.ndim == 2:
                found[key] = loaded
            else:
                pixels[key] = loaded
        if pixels:
            made = self._model.encode_images(torch.cat(list(pixels.values())), max_views=MAX_VIEWS).unbind()
            found |= zip(pixels, made, strict=True)
            # an object's key may name another object later, a file's may not
            self._tokens |= {key: tokens for key, tokens in zip(pixels, made, strict=True) if key in files}
        while len(self._tokens) > NUM_KEPT_IMAGES:
            self._tokens.popitem(last=False)
        return found


def _key(image: ImageInput | None) -> Hashable:
    return str(image) if isinstance(image, str | Path) else id(image)


def answer_requests(
    model: SphinxModel,
    requests: Iterable[Request | None],
    *,
    batch_size: int = 8,
    num_workers: int = 2,
    num_draft_tokens: int | None = None,
    truncate: Literal["left"] | None = None,
    on_text: Callable[[Request, str], None] | None = None,
) -> Iterator[Answer]:
    """Answer requests by continuous batching; yields answers in order of completion.

    At most ``batch_size`` sequences are decoded together; a new request takes the place of a finished one. Threads open
    and preprocess images one batch ahead of the model. Each answer equals that of ``SphinxModel.generate`` for the
    request alone (up to ties within rounding).

    Args:
        model: Must have a tokenizer.
        requests: Iterated lazily. A None item means that no request has arrived yet; running requests continue.
        batch_size: Maximum number of sequences decoded together.
        num_workers: Threads that load images.
        num_draft_tokens: Maximum draft length of prompt lookup, for greedy requests; see ``generation.Decoder``.
        truncate: See ``SphinxModel.generate``.
        on_text: Called with a request and each piece of its answer; see ``SphinxModel.stream``.
    Raises:
        DataError: ``batch_size`` or ``num_workers`` is not positive, or there is no tokenizer. Errors of a single
            request are reported in its answer.
    """
    for name, value in (("batch_size", batch_size), ("num_workers", num_workers)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    with ThreadPoolExecutor(num_workers) as pool:
        loop = _Loop(model, requests, _Images(model, pool), batch_size, num_draft_tokens, truncate)
        try:
            while not loop.is_done:
                yield from loop.step(on_text)
        finally:
            pool.shutdown(cancel_futures=True)


class _Loop:
    """State of ``answer_requests``; see there for the arguments."""

    def __init__(
        self,
        model: SphinxModel,
        requests: Iterable[Request | None],
        images: _Images,
        batch_size: int,
        num_draft_tokens: int | None,
        truncate: Literal["left"] | None,
    ) -> None:
        self._model, self._images, self._batch_size = model, images, batch_size
        self._num_draft_tokens, self._truncate = num_draft_tokens, truncate
        self._source = iter(requests)
        self._is_exhausted = False
        self._upcoming: deque[Request] = deque()
        self._batch = ContinuousBatch(
            model.llm, model.require_tokenizer(), end_ids=model.end_ids, capacity_multiple=CAPACITY_MULTIPLE
        )
        self._running: dict[GeneratedSequence, Request] = {}

    @property
    def is_done(self) -> bool:
        """Whether all requests are answered and none are left."""
        return self._is_exhausted and not self._upcoming and not self._running

    def step(self, on_text: Callable[[Request, str], None] | None) -> Iterator[Answer]:
        """Admit requests while there is room, then prefill or decode."""
        self._look_ahead(1 + self._batch_size)
        count = min(self._batch_size - len(self._running), len(self._upcoming))
        newcomers = [self._upcoming.popleft() for _ in range(count)]
        self._look_ahead(self._batch_size)
        yield from self._admit(newcomers)
        if not self._running:
            return
        finished = self._batch.step()
        if on_text is not None:
            for sequence, request in self._running.items():
                if piece := sequence.new_text():
                    on_text(request, piece)
        for sequence in finished:
            request = self._running.pop(sequence)
            try:
                yield Answer(request, sequence.result())
            except DataError as error:
                yield Answer(request, error=str(error))

    def _look_ahead(self, count: int) -> None:
        """Take requests until ``count`` are waiting, and start loading their images."""
        while len(self._upcoming) < count and not self._is_exhausted:
            try:
                request = next(self._source)
            except StopIteration:
                self._is_exhausted = True
                return
            if request is None:
                return
            self._upcoming.append(request)
            self._images.expect(request.image)

    def _admit(self, newcomers: list[Request]) -> Iterator[Answer]:
        """Encode the images of new requests together and add the requests; yields the failed ones."""
        encoded = self._images.encode(request.image for request in newcomers if request.image is not None)
        for request in newcomers:
            image = None if request.image is None else encoded[_key(request.image)]
            try:
                if isinstance(image, SphinxkitError):
                    raise image
                sampling = request.sampling
                [prompt] = self._model.embed_prompts([request.prompt], [image], self._truncate, sampling.max_new_tokens)
                sequence = self._batch.add(
                    prompt.embeds,
                    sampling,
                    prompt_ids=prompt.token_ids,
                    num_draft_tokens=None if sampling.temperature > 0 else self._num_draft_tokens,
                )
            except (DataError, ShapeError) as error:
                yield Answer(request, error=str(error))
            else:
                self._running[sequence] = request
