"""Loads images in any form as upright 8-bit RGB; errors name the file."""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sphinxkit.errors import DataError

# Pillow's own default (PIL.Image.MAX_IMAGE_PIXELS): a quarter of a gibibyte at three bytes a pixel. Where Pillow warns
# above it, load_image refuses.
MAX_PIXELS = 1024**3 // 4 // 3
MAX_NAME = 300  # characters of a path that messages show; our choice
# Formats that are opened: pictures, nothing that runs another program (EPS starts Ghostscript). Our choice.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)
# Formats whose further frames are no animation: a phone's MPO holds its photo first, a PSD its flattened picture.
STILL_FIRST = ("MPO", "PSD")
# Modes of more than 8 bits a channel, which Pillow would clip to white, by how their bytes are read.
DEEP_DTYPES = {
    "I;16": torch.uint16,
    "I;16L": torch.uint16,
    "I;16N": torch.uint16,
    "I": torch.int32,
    "F": torch.float32,
}
# Modes that Pillow does not take straight to RGB: a palette whose transparency is given as bytes makes it warn, and
# premultiplied alpha has no conversion.
DETOURS = {"P": "RGBA", "La": "LA", "RGBa": "RGBA"}


def image_below(root: Path, name: str, *, follow_links: bool = True) -> Path:
    """The path of an image that a record names below a root; it may not leave the root.

    Links inside the root are its owner's; a name cannot leave the root through one by ``..``.

    Args:
        root: Base folder that the user chose.
        name: As in the record.
        follow_links: Whether links may lead out of the root.
    Raises:
        DataError: An absolute path, or one that leads out of ``root``.
    """
    path = root / os.path.normpath(name)
    is_outside = Path(name).is_absolute() or os.path.normpath(name).split(os.sep, 1)[0] == os.pardir
    if is_outside or not (follow_links or _resolved(path).is_relative_to(_resolved(root))):
        shown = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
        raise DataError(f"image {shown!r} is not below the folder of images, {root}; name it relative to that folder")
    return path


def _resolved(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL, which no file's name holds
        return path


ImageSource: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | BinaryIO | NDArray[np.uint8]
"""A PIL image, a path, a file's bytes, a binary file object, or a uint8 array (H, W, 3) or (H, W)."""


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load an image as upright 8-bit RGB.

    The EXIF orientation is applied, alpha dropped (as PIL's ``convert("RGB")`` does), grey, palette and CMYK images
    become RGB and deeper ones 8-bit (see ``to_rgb``).

    Args:
        source: See ``ImageSource``; a file object is read to its end.
        max_pixels: Decompression-bomb limit: width times height of the largest image taken.
    Raises:
        DataError: The file is missing, not a regular file, unreadable, empty, in none of ``FORMATS``, truncated or
            damaged, animated, or larger than ``max_pixels`` (the message names the file); or ``source`` is no image.
    """
    if isinstance(source, Image.Image):
        return _upright(source, str(getattr(source, "filename", "") or "(opened with PIL)"))
    if isinstance(source, np.ndarray):
        return _of_array(source)
    name, data = _read(source)
    if not data:
        raise DataError(f"image {name}: the file is empty")
    try:
        Image.init()
        image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        start = data[:16]
        raise DataError(
            f"image {name}: not an image in a format that is opened ({', '.join(FORMATS)}); it starts with {start!r}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"image {name}: {error}; scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels if you trust it"
        ) from error
    except Exception as error:
        raise DataError(f"image {name}: cannot be opened, {type(error).__name__}: {error}") from error
    with image:
        if image.width * image.height > max_pixels:
            raise DataError(
                f"image {name}: {image.width}x{image.height} pixels are more than the limit of {max_pixels}; scale it "
                "down, or raise max_pixels if you trust the file"
            )
        try:
            frames = getattr(image, "n_frames", 1)
        except Exception as error:
            raise _damaged(name, error) from error
        if frames > 1 and image.format not in STILL_FIRST:
            raise DataError(
                f"image {name}: an animated or multi-page {image.format} of {frames} frames; save the frame you mean "
                "as an image of its own"
            )
        return _upright(image, name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Load, turn as EXIF says, and convert to 8-bit RGB."""
    try:
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they meet: OSError, SyntaxError, struct.error, ...
        raise _damaged(name, error) from error
    try:
        return to_rgb(image)
    except DataError as error:
        raise DataError(f"image {name}: {error}") from error


def _orientation(image: Image.Image) -> Any:
    """EXIF's; 1, upright, where it cannot be read: the picture is whole without it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged block can raise anything
        return 1


def _of_array(array: NDArray[Any]) -> Image.Image:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise DataError(
            f"image: expected a uint8 array (H, W, 3) or (H, W), got {array.dtype} {array.shape}; scale the values to "
            "0..255 and put the colours last"
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB.

    Like PIL's ``convert("RGB")`` (alpha is dropped), except that values deeper than 8 bits are scaled, not clipped:
    unsigned 16-bit from [0, 65535]; 32-bit integers from [0, 65535] if they lie there and from their own range
    otherwise; floats from [0, 1], [0, 255] or [0, 65535], the first of them that they lie in, and from their own range
    otherwise. Those ranges are our choice. (16-bit colour Pillow itself reduces to 8 bits as it opens the file.)

    Raises:
        DataError: A mode without an RGB form, or floats that are not finite.
    """
    if image.mode == "RGB":
        return image
    if image.mode in DEEP_DTYPES or image.mode == "I;16B":
        return _shallow(image).convert("RGB")
    try:
        by_way_of = DETOURS.get(image.mode)
        return (image.convert(by_way_of) if by_way_of else image).convert("RGB")
    except (ValueError, ImportError) as error:  # ImportError: LAB on a Pillow that was built without LittleCMS
        raise DataError(f"an image of mode {image.mode} has no RGB form ({error}); convert it first") from error


_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def _read(source: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        return "<bytes>", source
    if isinstance(source, str) and _URL.match(source):
        raise DataError(f"image {source}: this is a URL; download the image and name the file")
    if isinstance(source, (str, os.PathLike)):
        path, name = Path(source), str(source)
        if len(name) > MAX_NAME:
            name = f"{name[: MAX_NAME // 2]}...{name[-MAX_NAME // 2 :]}"
        try:
            mode = path.stat().st_mode
            data = path.read_bytes() if stat.S_ISREG(mode) else b""
        except FileNotFoundError as error:
            raise DataError(f"image {name}: there is no such file") from error
        except OSError as error:
            raise DataError(f"image {name}: cannot be read, {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"image {name}: cannot be read, {error}") from error
        if stat.S_ISDIR(mode):
            raise DataError(f"image {name}: this is a directory, not an image file")
        if not stat.S_ISREG(mode):
            raise DataError(f"image {name}: not a regular file but a pipe or a device")
        return name, data
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "<file object>"))
        try:
            data = source.read()
        except (OSError, ValueError) as error:
            raise DataError(f"image {name}: cannot be read, {error}") from error
        if not isinstance(data, bytes):
            raise DataError(f"image {name}: the file object gives {type(data).__name__}; open it in binary mode")
        return name, data
    raise DataError(
        "image: expected a PIL image, a path, bytes, a binary file or a uint8 array (H, W, 3), got "
        f"{type(source).__name__}"
    )


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"image {name}: the file is truncated or damaged ({type(error).__name__}: {error})")


def _shallow(image: Image.Image) -> Image.Image:
    if image.mode == "I;16B":
        image = image.convert("I")
    dtype = DEEP_DTYPES[image.mode]
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype).to(torch.float32)
    low, high = _range(values, dtype)
    scaled = values.sub_(low).mul_(255.0 / (high - low)).round_().to(torch.uint8)
    return Image.frombytes("L", image.size, scaled.numpy().tobytes())


def _range(values: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.uint16:
        return 0.0, 65535.0
    if not bool(values.isfinite().all()):
        raise DataError("an image of mode F holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    for limit in (1.0, 255.0, 65535.0) if dtype.is_floating_point else (65535.0,):
        if low >= 0 and high <= limit:
            return 0.0, limit
    return low, (high if high > low else low + 1.0)
