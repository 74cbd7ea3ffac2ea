"""lmms-eval: the model class behind ``lmms-eval --model sphinxkit``."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from sphinxkit.batch_inference import Request, answer_requests
from sphinxkit.errors import DataError, SphinxkitError
from sphinxkit.formatters.tasks.coordinates import NUMBER
from sphinxkit.generation import Sampling
from sphinxkit.geometry import ImageGeometry, Point
from sphinxkit.integrations.optional import require
from sphinxkit.recipe import load
from sphinxkit.tilers import load_image

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms as _Base
else:
    try:
        from lmms_eval.api.model import lmms as _Base
    except ImportError:
        _Base = object

Frame = Literal["square", "image", "pixels"]

MAX_NEW_TOKENS = 512  # where a task names none; our choice
BATCH_SIZE = 8  # our choice
# The frame that a task compares boxes in, by its name; other tasks get answers as they are.
# Source: lmms-eval 0.7.3, tasks/refcoco*/utils_rec.py, tasks/refcoco_grounding/utils.py.
FRAMES: dict[str, Frame] = {r"refcoco.*_bbox_rec": "image", r"refcoco.*_grounding": "pixels"}
_BOX = r"\s*,\s*".join([rf"(?:{NUMBER.pattern})"] * 4)
_BOXES = re.compile(rf"\[\s*({_BOX}(?:\s*;\s*{_BOX})*)\s*\]")


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` gives: the model's name and class.

    Raises:
        MissingPackageError: lmms-eval is not installed.
    """
    registry = require("lmms_eval.models.registry_v2", "lmms_eval")
    return registry.ModelManifest(model_id="sphinxkit", chat_class_path=f"{__name__}.SphinxForLmmsEval")


def move_boxes(text: str, image: ImageGeometry, frame: Frame) -> str:
    """Write an answer's boxes in another frame; the rest of the text stays.

    Args:
        text: Boxes ``[x1, y1, x2, y2]`` or ``[x1, y1, x2, y2; ...]`` in fractions of the padded square.
        image: The image's size.
        frame: "image": fractions of the image's width and height. "pixels": of the image. "square": as they are.
    Returns:
        The text. Boxes are not clipped to the image, so overlaps stay what they are.
    """
    if frame == "square":
        return text
    width, height = (image.width, image.height) if frame == "image" else (1, 1)

    def moved(found: re.Match[str]) -> str:
        numbers = map(float, NUMBER.findall(found.group(1)))
        points = [image.point_to_pixels(Point(x, y)) for x, y in zip(numbers, numbers, strict=True)]
        corners = iter([f"{point.x / width:.6f}, {point.y / height:.6f}" for point in points])
        return "[" + "; ".join(f"{start}, {end}" for start, end in zip(corners, corners, strict=True)) + "]"

    return _BOXES.sub(moved, text)


class SphinxForLmmsEval(_Base):
    """A model of sphinxkit in lmms-eval: questions as messages, answers as text.

    A question that cannot be asked (several images, too long) gets an empty answer and a warning.

    Args:
        pretrained: What ``sphinxkit.load`` reads.
        dtype: Of the weights, such as "float32" or "bfloat16".
        device: Where it runs; None: CUDA if there is a GPU.
        batch_size: Questions answered together; a word ("auto"): ``BATCH_SIZE``.
        boxes: The frame of boxes in answers, see ``move_boxes``. None: what the task compares, see ``FRAMES``.
        max_batch_size: Ignored; lmms-eval passes it.
    Raises:
        DataError: ``boxes``, ``dtype`` or ``device`` is unknown.
        CheckpointError: As ``sphinxkit.load``.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = BATCH_SIZE,
        boxes: Frame | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        require("lmms_eval", "lmms_eval")
        super().__init__()
        if boxes not in (None, "square", "image", "pixels"):
            raise DataError(f"boxes must be square, image or pixels, got {boxes!r}")
        self.model = load(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=dtype)
        self.boxes = boxes
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else BATCH_SIZE  # type: ignore[arg-type]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in order.

        Args:
            requests: Of lmms-eval.
        """
        asked = []
        for request in requests:
            _, to_messages, settings, *place = request.args
            asked.append((partial(self._messages, to_messages, *place), settings, place[1]))
        return self._answer(asked)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers of each round; the task makes each round's messages from the answers before.

        Args:
            requests: Of lmms-eval.
        """
        every = []
        for request in requests:
            _, to_messages, settings, doc_id, task, split = request.args
            doc = self._doc(doc_id, task, split)
            said: list[str] = []
            messages, info = to_messages(doc), None
            while messages is not None:
                said += self._answer([(partial(lambda now: now, messages), settings, task)])
                following = to_messages(doc, round_idx=len(said), previous_output=list(said), previous_round_info=info)
                if not (isinstance(following, tuple) and len(following) == 4):
                    break
                messages, is_over, _, info = following
                messages = None if is_over else messages
            every.append(said)
        return every

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's answer in the model's template, and whether greedy decoding writes it.

        lmms-eval 0.7.3 asks models that take messages for none.

        Args:
            requests: Of lmms-eval: question, answer (a text or a function of the document), a function of the document
                that gives its images, the document's number, task, split; or a question and an answer alone.
        Raises:
            DataError: As ``SphinxModel.score``.
        """
        found = []
        for first in range(0, len(requests), self.batch_size):
            contexts, answers, images = [], [], []
            for request in requests[first : first + self.batch_size]:
                question, answer, *place = request.args
                doc = self._doc(*place[1:]) if place else None
                text = answer if isinstance(answer, str) else answer(doc)
                prompt, _ = self.model.chat_prompt(question)
                whole, _ = self.model.chat_prompt(question, answer_start=text.strip())
                contexts.append(prompt)
                answers.append(whole[len(prompt) :])
                images.append(_single(place[0](doc) or ()) if place else None)
            found += self.model.score(contexts, answers, images)
        return [(each.log_likelihood, each.is_greedy) for each in found]

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _messages(self, to_messages: Callable[[Any], Any], *place: Any) -> Any:
        return to_messages(self._doc(*place))  # documents are read when they are asked: their images take memory

    def _answer(self, asked: Sequence[tuple[Callable[[], Any], Mapping[str, Any], str]]) -> list[str]:
        """Answers to (function that makes the messages, settings, task)."""
        texts = [""] * len(asked)
        errors: dict[int, str] = {}
        sizes: dict[int, ImageGeometry] = {}
        for answer in answer_requests(self.model, self._requests(asked, sizes, errors), batch_size=self.batch_size):
            row, size = answer.request.index, sizes.pop(answer.request.index, None)
            if answer.generation is None:
                errors[row] = str(answer.error)
                continue
            texts[row] = answer.generation.text.strip()
            if size is not None:
                texts[row] = move_boxes(texts[row], size, self.boxes or frame_of(asked[row][2]))
        if errors:
            row, error = next(iter(sorted(errors.items())))
            told = f"{asked[row][2]}: {len(errors)} of {len(asked)} questions cannot be asked; number {row}: {error}"
            if len(errors) == len(asked) > 1:
                raise DataError(told)
            logging.getLogger(__name__).warning("%s; they count as empty answers", told)
        return texts

    def _requests(
        self, asked: Sequence[Any], sizes: dict[int, ImageGeometry], errors: dict[int, str]
    ) -> Iterator[Request]:
        for row, (to_messages, settings, _) in enumerate(asked):
            try:
                messages, pictures = _read_messages(to_messages())
                image = _single(pictures)
                prompt, stops = self.model.chat_prompt(messages)
                request = Request(row, prompt, image, _sampling(settings, stops, seed=row))
            except (SphinxkitError, OSError) as error:
                errors[row] = str(error)
                continue
            if image is not None:
                sizes[row] = ImageGeometry(*image.size)
            yield request


def frame_of(task: str) -> Frame:
    """The frame that a task of lmms-eval compares boxes in.

    Args:
        task: Its name.
    """
    return next((frame for pattern, frame in FRAMES.items() if re.match(pattern, task)), "square")


def _sampling(settings: Mapping[str, Any], stops: Sequence[str], seed: int) -> Sampling:
    if int(settings.get("num_beams") or 1) != 1:
        raise DataError(f"num_beams={settings['num_beams']}: there is no beam search; pass --gen_kwargs num_beams=1")
    until = settings.get("until") or ()
    until = [until] if isinstance(until, str) else until
    is_random = bool(settings.get("do_sample", True)) and float(settings.get("temperature") or 0) > 0
    return Sampling(
        max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
        temperature=float(settings["temperature"]) if is_random else 0.0,
        top_p=float(settings.get("top_p") or 1.0) if is_random else 1.0,
        stop=(*stops, *filter(None, until)),
        seed=seed if is_random else None,
    )


def _read_messages(made: Any) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages of text, and their images."""
    from lmms_eval.protocol import ChatMessages

    chat = ChatMessages(messages=made)
    images, videos, audios = chat.extract_media()
    if videos or audios:
        raise DataError("the model reads images and text, got video or audio")
    texts = ["\n".join(part.text for part in turn.content if part.type == "text") for turn in chat.messages]
    return [{"role": turn.role, "content": text} for turn, text in zip(chat.messages, texts, strict=True)], images


def _single(pictures: Sequence[Any]) -> Image.Image | None:
    """A question's image or None, upright."""
    if len(pictures) > 1:
        raise DataError(f"the model reads one image a question, got {len(pictures)}")
    return load_image(pictures[0]) if pictures else None


__all__ = ["SphinxForLmmsEval", "frame_of", "manifest", "move_boxes"]
