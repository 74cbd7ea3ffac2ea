"""A folder of images with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Iterator

from sphinxkit.data.converters.base import Converted, Problems, Source
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import ClassificationSample

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))


def classification(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per image; the class is the name of its folder, underscores as spaces. Other files are reported."""
    if not source.path.is_dir():
        raise DataError(f"{source.path}: expected a folder with one sub-folder per class")
    for folder in sorted(path for path in source.path.iterdir() if path.is_dir()):
        label = folder.name.replace("_", " ").strip()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            image = path.relative_to(source.path).as_posix()
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                problems.add(path, 0, f"not an image by its suffix {path.suffix!r}")
            else:
                yield Converted(image, image, ClassificationSample(label), path, 0)
