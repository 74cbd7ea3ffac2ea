"""Cut one high-resolution image into a downsampled view and its sub-images."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from sphinxkit.errors import ShapeError
from sphinxkit.pixels import check_pixels, resize_pixels
from sphinxkit.tilers.base import register


@register("grid")
@dataclass(frozen=True)
class GridTiler:
    """Cut an image into rows x cols crops, with a downsampled view of the whole image first.

    SPHINX is ``GridTiler(1, 1, 224, thumbnail=False)``, SPHINX-1k ``GridTiler(2, 2, 224)``, SPHINX-2k
    ``GridTiler(3, 3, 224)``. An encoder with another input size (DINOv2's 224 beside ConvNeXt's 512) asks the same
    tiler for its own ``tile_size``.

    Args:
        rows: Crops from top to bottom.
        cols: Crops from left to right.
        tile_size: Side of a crop in pixels; the image is ``rows * tile_size`` high and ``cols * tile_size`` wide.
        thumbnail: View 0 is the whole image, resized to a crop's size.
    Raises:
        ShapeError: ``rows``, ``cols`` or ``tile_size`` is not a positive int.
    Source: SPHINX, arXiv:2311.07575, section 3.4; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py and (second
        size) llama_ens5_light.py, encode_image.
    """

    rows: int = 2
    cols: int = 2
    tile_size: int = 224
    thumbnail: bool = True

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "tile_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ShapeError(f"grid tiler: {name} must be an int of at least 1, got {value!r}")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image that ``tile`` takes."""
        return self.rows * self.tile_size, self.cols * self.tile_size

    @property
    def num_views(self) -> int:
        """Views of one image, V."""
        return self.rows * self.cols + int(self.thumbnail)

    @property
    def is_tile(self) -> tuple[bool, ...]:
        """For each view whether it is a sub-image crop; a view of the whole image is none."""
        crops = (self.rows * self.cols > 1,) * (self.rows * self.cols)
        return (False, *crops) if self.thumbnail else crops

    def tile(self, pixels: Tensor, tile_size: int | None = None) -> Tensor:
        """Make the views of a batch of images.

        The thumbnail always goes through ``resize_pixels`` (bicubic, float16), even at equal size. So does the image
        before it is cut when ``tile_size`` differs from the tiler's own; otherwise crops are copies of the pixels.
        With a single view of the whole image (1 x 1, no thumbnail) ``tile_size=None`` leaves the pixels alone and
        any explicit ``tile_size`` resizes, as the public implementation rounds even a 512 -> 512 "resize".

        Args:
            pixels: CLIP-normalised.
            tile_size: Side of a view in pixels; None: the tiler's own.
        Shape:
            pixels: (B, 3, rows*tile_size, cols*tile_size)
            return: (B, V, 3, T, T); the thumbnail first, then crops row by row
        Raises:
            ShapeError: The pixels are not of ``image_size``, or ``tile_size`` is not positive.
        """
        check_pixels(pixels, "grid tiler")
        if tuple(pixels.shape[2:]) != self.image_size:
            raise ShapeError(
                f"grid tiler: expected an image of {self.image_size[0]}x{self.image_size[1]} pixels "
                f"({self.rows}x{self.cols} tiles of {self.tile_size}), got {pixels.shape[2]}x{pixels.shape[3]}"
            )
        side = self.tile_size if tile_size is None else tile_size
        if not isinstance(side, int) or side < 1:
            raise ShapeError(f"grid tiler: tile_size must be an int of at least 1, got {side!r}")
        is_single = self.num_views == 1
        whole = pixels
        if side != self.tile_size or (is_single and tile_size is not None):
            whole = resize_pixels(pixels, (self.rows * side, self.cols * side), "bicubic")
        if is_single:
            return whole.unsqueeze(1)
        crops = rearrange(whole, "b c (r h) (s w) -> b r s c h w", r=self.rows, s=self.cols)
        if not self.thumbnail:
            return crops.flatten(1, 2)
        views = pixels.new_empty(len(pixels), self.num_views, 3, side, side)
        views[:, 0] = resize_pixels(pixels, (side, side), "bicubic")
        views[:, 1:].unflatten(1, (self.rows, self.cols)).copy_(crops)  # type: ignore[no-untyped-call]
        return views

    __call__ = tile

    def untile(self, views: Tensor) -> Tensor:
        """Join crops into one image again; the thumbnail is ignored.

        Args:
            views: As ``tile`` returns them, with any number of channels.
        Shape:
            views: (B, V, C, h, w)
            return: (B, C, rows*h, cols*w)
        Raises:
            ShapeError: The number of views is wrong.
        """
        if views.ndim != 5 or views.shape[1] != self.num_views:
            raise ShapeError(f"grid tiler: expected views (B, {self.num_views}, C, h, w), got {tuple(views.shape)}")
        crops = views[:, 1:] if self.thumbnail else views
        return rearrange(crops, "b (r s) c h w -> b c (r h) (s w)", r=self.rows, s=self.cols)
