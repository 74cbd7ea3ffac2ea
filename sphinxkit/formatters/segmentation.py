"""From the boxes and points of an answer to masks, through any segmenter that takes such prompts.

SPHINX says where things are; a promptable segmenter such as SAM finds their outlines.
Source: SPHINX, arXiv:2311.07575, section 4 (its combination with SAM); SAM, arXiv:2304.02643.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import GroundedPhrase, Keypoints
from sphinxkit.geometry import Box, ImageGeometry, Point
from sphinxkit.pixels import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class SegmentationPrompt:
    """What one mask is wanted of: a box, points on the thing, or both, in original pixels.

    Args:
        label: The words for it, may be empty.
        box: Around it.
        points: On it.
    """

    label: str = ""
    box: Box | None = None
    points: tuple[Point, ...] = ()


class Segmenter(Protocol):
    """Turns prompts into masks."""

    def segment(self, image: Image.Image, prompts: Sequence[SegmentationPrompt]) -> torch.Tensor:
        """One mask for each prompt.

        Args:
            image: The original image.
            prompts: In its pixels.
        Returns:
            (N, H, W) bool, at the image's size.
        """
        ...


def prompts_from_items(items: Iterable[Any]) -> list[SegmentationPrompt]:
    """The boxes and points that a parser found, each as a prompt for one mask; words are passed over.

    A body's key points are one prompt: they all lie on it.

    Args:
        items: ``ParseResult.items`` of any task.
    """
    prompts: list[SegmentationPrompt] = []
    for item in items:
        match item:
            case Box():
                prompts.append(SegmentationPrompt(box=item))
            case GroundedPhrase():
                prompts += [SegmentationPrompt(item.phrase, box) for box in item.boxes]
            case Point():
                prompts.append(SegmentationPrompt(points=(item,)))
            case Keypoints():
                prompts.append(SegmentationPrompt("person", points=tuple(item.points.values())))
    return prompts


def check_prompts(prompts: Sequence[SegmentationPrompt], geometry: ImageGeometry) -> None:
    """Raise unless every prompt has something to go by, inside the image.

    Raises:
        DataError: A prompt is empty, or reaches out of the image.
    """
    for index, prompt in enumerate(prompts):
        if prompt.box is None and not prompt.points:
            raise DataError(f"segmentation: prompt {index} ({prompt.label!r}) has neither box nor points")
        is_inside = prompt.box is None or geometry.clip_box(prompt.box) == prompt.box
        if not is_inside or any(geometry.clip_point(point) != point for point in prompt.points):
            raise DataError(f"segmentation: prompt {index} reaches out of the {geometry.width}x{geometry.height} image")


class SamSegmenter:
    """Segment Anything through transformers' ``SamModel`` (extra ``sam``).

    The image is scaled so that its longer side fits the network, padded at the right and bottom; of the masks that the
    network offers for a prompt, the one that it rates best is taken.

    Args:
        model: A ``transformers.SamModel``, on its device and in its dtype.
    Raises:
        DataError: It is no SAM model.
    Source: Kirillov et al., arXiv:2304.02643; transformers, models/sam.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "sam":
            raise DataError(f"segmentation: expected a transformers SamModel, got {type(model).__name__}")
        self.model = model.eval()
        self.image_size = int(model.config.vision_config.image_size)  # type: ignore[union-attr, arg-type]

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> SamSegmenter:
        """Load a model.

        Args:
            name: A folder, or a name on the hub such as "facebook/sam-vit-base".
            options: Handed to ``SamModel.from_pretrained``.
        Raises:
            ImportError: transformers is not installed.
        """
        try:
            from transformers import SamModel
        except ImportError as error:
            raise ImportError("SAM needs transformers: pip install 'sphinxkit[sam]'") from error
        return cls(SamModel.from_pretrained(name, **options))

    def _pixels(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """(1, 3, S, S) normalised pixels, and the (height, width) of the image inside them."""
        from PIL import Image as PILImage

        scale = self.image_size / max(image.size)
        width, height = (int(side * scale + 0.5) for side in image.size)
        resized = image.convert("RGB").resize((max(width, 1), max(height, 1)), PILImage.Resampling.BILINEAR)
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(resized.height, resized.width, 3).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        canvas = torch.zeros(1, 3, self.image_size, self.image_size)
        canvas[0, :, : resized.height, : resized.width] = (pixels - mean) / std
        return canvas, (resized.height, resized.width)

    @torch.no_grad()
    def segment(self, image: Image.Image, prompts: Sequence[SegmentationPrompt]) -> torch.Tensor:
        """One mask for each prompt.

        Args:
            image: The original image.
            prompts: In its pixels.
        Shape:
            return: (N, H, W) bool on the CPU, N prompts, at the image's size
        Raises:
            DataError: A prompt is empty, or reaches out of the image.
        """
        check_prompts(prompts, ImageGeometry(*image.size))
        if not prompts:
            return torch.zeros(0, image.height, image.width, dtype=torch.bool)
        parameter = next(self.model.parameters())
        pixels, inside = self._pixels(image)
        embeddings = self.model.get_image_embeddings(pixels.to(parameter))  # type: ignore[operator]
        scale = torch.tensor([inside[1] / image.width, inside[0] / image.height])
        masks = [self._mask(embeddings, prompt, scale, inside, image) for prompt in prompts]
        return torch.stack(masks)

    def _mask(
        self,
        embeddings: torch.Tensor,
        prompt: SegmentationPrompt,
        scale: torch.Tensor,
        inside: tuple[int, int],
        image: Image.Image,
    ) -> torch.Tensor:
        inputs: dict[str, torch.Tensor] = {}
        if prompt.points:
            points = torch.tensor([[point.x, point.y] for point in prompt.points]) * scale
            inputs["input_points"] = points[None, None].to(embeddings)
            inputs["input_labels"] = torch.ones(1, 1, len(points), dtype=torch.long, device=embeddings.device)
        if prompt.box is not None:
            corners = torch.tensor([prompt.box.x1, prompt.box.y1, prompt.box.x2, prompt.box.y2])
            inputs["input_boxes"] = (corners * scale.repeat(2))[None, None].to(embeddings)
        output = self.model(image_embeddings=embeddings, multimask_output=True, **inputs)
        best = int(output.iou_scores[0, 0].argmax())
        low = output.pred_masks[:, 0, best : best + 1].float()
        size = (self.image_size, self.image_size)
        full = torch.nn.functional.interpolate(low, size, mode="bilinear", align_corners=False)
        full = full[..., : inside[0], : inside[1]]
        final = torch.nn.functional.interpolate(full, (image.height, image.width), mode="bilinear", align_corners=False)
        return (final[0, 0] > 0).cpu()
