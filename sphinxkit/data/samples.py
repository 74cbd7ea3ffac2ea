"""Training samples: a conversation or plain text, with an image or without."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sphinxkit.errors import DataError
from sphinxkit.formatters import Message

if TYPE_CHECKING:
    from PIL.Image import Image

SampleType = Literal["text", "image-text"]


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image inside of an archive or a table; it is decoded when it is opened.

    Args:
        name: For messages.
        data: The image file's bytes.
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample: a conversation, or plain text.

    Args:
        id: Name in reports: source and line.
        task: Name of its task, or "".
        messages: The conversation; empty for plain text.
        text: Plain text; "" for a conversation.
        image: The image's path, or its bytes from an archive or a table, or None.
        where: "file:line".
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    text: str
    image: Path | StoredImage | None
    where: str

    @property
    def type(self) -> SampleType:
        """``image-text`` with an image, else ``text``."""
        return "text" if self.image is None else "image-text"

    def open_image(self) -> Image:
        """The image, upright, in RGB.

        Raises:
            DataError: There is no image, or it cannot be read; the message names file and sample.
        """
        from sphinxkit.tilers.images import load_image

        if self.image is None:
            raise DataError(f"sample {self.id}: it has no image")
        try:
            return load_image(self.image.data if isinstance(self.image, StoredImage) else self.image)
        except DataError as error:
            message = str(error).replace("<bytes>", str(self.image), 1)
            raise DataError(f"sample {self.id}: {message}") from error
