"""Image processor and processor: pixels and token ids as sphinxkit makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin, __version__
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from sphinxkit.errors import DataError
from sphinxkit.integrations.optional import version_numbers
from sphinxkit.tensor_files.tokenizer_files import IMAGE_TOKEN
from sphinxkit.tilers import preprocess

# Before 5.18, apply_chat_template compares tokens' spans with answers' as if no image token were repeated.
_MARKS_GIVEN_TEXT = version_numbers(__version__) < [5, 18]


class SphinxImageProcessor(BaseImageProcessor):
    """Images padded to a square, resized and normalised by :func:`sphinxkit.tilers.preprocess`.

    Args:
        size: ``{"height": S, "width": S}`` of the pixels.
        kwargs: Further entries of ``preprocessor_config.json``; pixels do not depend on them.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers reads it from the class

    def __init__(self, size: Mapping[str, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = {"height": 224, "width": 224} if size is None else dict(size)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Pixels of images.

        Args:
            images: One or more, in any form that transformers takes: PIL images, arrays, tensors, paths, URLs.
            return_tensors: "pt" or "np"; None: a list of tensors.
            kwargs: Ignored.
        Shape:
            return: ``pixel_values`` (B, 3, S, S) float32
        Raises:
            DataError: An image cannot be read.
        """
        pictures = [_as_source(image) for image in make_flat_list_of_images(self.fetch_images(images))]
        pixels = preprocess(pictures, self.size["height"])
        return BatchFeature({"pixel_values": list(pixels)}, tensor_type=return_tensors)


def _as_source(image: Any) -> Any:
    """Arrays with channels first and tensors as PIL images; the rest is read as it is."""
    is_plain = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image if isinstance(image, Image.Image) or is_plain else to_pil_image(image)


class SphinxProcessor(ProcessorMixin):
    """Texts and images to what the model reads.

    A text begins with beginning-of-sentence and, if it has an image, its token; both are put there where they are
    missing. The image's token becomes as many as the image has visual tokens.

    Args:
        image_processor: A :class:`SphinxImageProcessor`.
        tokenizer: With a token for images.
        chat_template: The model's, in Jinja.
        num_image_tokens: Visual tokens of one image, image delimiters included.
        image_token: Stands for an image.
        kwargs: Ignored, for entries of later versions.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 1,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers: ``input_ids``, ``attention_mask`` and ``pixel_values``.

        Args:
            images: One for each text that has one, in order.
            text: One or more texts; templates are not applied.
            videos: Not supported.
            audio: Not supported.
            kwargs: As in transformers.
        Raises:
            DataError: A text has several images, or its image is not in front; videos or audio.
        """
        if videos is not None or audio is not None:
            raise DataError("sphinx: reads images and text, got videos or audio")
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            count = 0 if images is None else len(make_flat_list_of_images(self.image_processor.fetch_images(images)))
            text = self._with_image_tokens(texts, count)
            bos = self.tokenizer.bos_token
            own = {**kwargs, **kwargs.get("text_kwargs", {})}
            if "add_special_tokens" not in own and any(bos and each.startswith(bos) for each in text):
                text = [each if each.startswith(bos) else bos + each for each in text]
                kwargs["add_special_tokens"] = False
        made = super().__call__(images=images, text=text, **kwargs)
        if "offset_mapping" in made and _MARKS_GIVEN_TEXT:
            pairs = zip(made["offset_mapping"], text, strict=True)
            made["offset_mapping"] = [self._given(spans, each) for spans, each in pairs]
        return made

    def _given(self, spans: Sequence[Sequence[int]], text: str) -> list[tuple[int, int]]:
        """Characters of the given text, for spans of the one with all image tokens."""
        first = text.find(self.image_token)
        if first < 0:
            return [(int(start), int(end)) for start, end in spans]
        end_of_image, gained = first + len(self.image_token), len(self.image_token) * (self.num_image_tokens - 1)
        moved = [[at if at <= first else max(end_of_image, int(at) - gained) for at in span] for span in spans]
        return [(int(start), int(end)) for start, end in moved]

    def _with_image_tokens(self, texts: Sequence[str], num_images: int) -> list[str]:
        bos, token = self.tokenizer.bos_token or "", self.image_token
        if num_images == len(texts) and not any(token in text for text in texts):
            return [(bos if text.startswith(bos) else "") + token + text.removeprefix(bos) for text in texts]
        for text in texts:
            said = text.removeprefix(bos)
            if text.count(token) > 1 and said.replace(token, ""):  # vLLM measures with images alone
                raise DataError(f"sphinx: reads one image a text, got {text.count(token)} in {text!r:.80}")
            if token in said and not said.startswith(token):
                raise DataError(f"sphinx: the image stands before all text, got {text!r:.80}")
        return list(texts)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What the token of an image becomes in the text."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)
