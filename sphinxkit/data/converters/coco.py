"""COCO and the data sets laid out like it: instances, key points, captions; PubLayNet and DocLayNet pages.

One pass over the file; what belongs to one image is brought together on disk.
Source: cocodataset.org, data format; PubLayNet, arXiv:1908.07836; DocLayNet, arXiv:2206.01062.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from sphinxkit.data.converters.base import (
    Converted,
    Problems,
    RecordError,
    Source,
    a_list,
    a_size,
    a_text,
    an_id,
    an_object,
    box_of,
)
from sphinxkit.data.converters.disk_tables import DiskTables
from sphinxkit.data.json_stream import is_finite_number, iter_json_members
from sphinxkit.formatters.tasks import CaptionSample, DetectionSample, Keypoints, LayoutSample, PoseSample
from sphinxkit.geometry import Box, ImageGeometry, Point

KeepFields = Callable[[dict[str, Any]], Any]
MakeSamples = Callable[["_Page"], Iterator[Converted]]


def _image(record: dict[str, Any]) -> list[Any]:
    return [a_text(record, "file_name"), *a_size(record)]


def _fill(
    tables: DiskTables, source: Source, problems: Problems, keep: KeepFields, needs_categories: bool
) -> dict[str, dict[str, Any]]:
    """Read the whole file: images into the tables, ``keep(annotation)`` as rows by image; returns the categories."""
    categories: dict[str, dict[str, Any]] = {}
    members = ["images", "annotations", *(["categories"] if needs_categories else [])]
    for member, item in iter_json_members(source.path, members, problems.on(source.path)):
        try:
            record = an_object(item.value)
            if member == "images":
                tables.put("images", an_id(record, "id"), _image(record))
            elif member == "categories":
                categories[str(an_id(record, "id"))] = {**record, "name": a_text(record, "name")}
            elif not record.get("iscrowd"):
                tables.add(an_id(record, "image_id"), item.line, keep(record))
        except RecordError as error:
            problems.add(source.path, item.line, f"{member}: {error}")
    return categories


def _category(categories: dict[str, dict[str, Any]], category_id: Any) -> dict[str, Any]:
    found = categories.get(str(category_id))
    if found is None:
        raise RecordError(f"category_id {category_id!r} is not among the categories")
    return found


def _per_image(
    source: Source,
    problems: Problems,
    keep: KeepFields,
    make: Callable[[_Page], Iterator[Converted]],
    *,
    categories: bool,
) -> Iterator[Converted]:
    with DiskTables() as tables:
        known = _fill(tables, source, problems, keep, categories)
        for image_id, rows in tables.groups():
            image = tables.get("images", image_id)
            if image is None:
                for line, _ in rows:
                    problems.add(source.path, line, f"annotations: image_id {image_id} is not among the images")
                continue
            yield from make(_Page(source, problems, known, image_id, image[0], ImageGeometry(*image[1:]), rows))


@dataclasses.dataclass(frozen=True, slots=True)
class _Page:
    """One image with its annotations as ``keep`` left them."""

    source: Source
    problems: Problems
    categories: dict[str, dict[str, Any]]
    id: str
    file_name: str
    geometry: ImageGeometry
    rows: list[tuple[int, Any]]

    def boxes(self) -> Iterator[tuple[int, str, Box]]:
        """(line, category, box) of the rows that can be used."""
        for line, (category_id, values) in self.rows:
            try:
                yield line, str(_category(self.categories, category_id)["name"]), box_of(values, self.geometry)
            except RecordError as error:
                self.problems.add(self.source.path, line, f"annotations: {error}")

    def converted(self, sample_id: str, sample: object, line: int) -> Converted:
        return Converted(sample_id, self.file_name, sample, self.source.path, line)


def _keep_box(record: dict[str, Any]) -> Any:
    return [an_id(record, "category_id"), a_list(record, "bbox")]


def detection(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per image and category: all its boxes. Crowd regions are left out."""

    def make(page: _Page) -> Iterator[Converted]:
        found: dict[str, list[Box]] = {}
        first: dict[str, int] = {}
        for line, category, box in page.boxes():
            found.setdefault(category, []).append(box)
            first.setdefault(category, line)
        for category, boxes in found.items():
            sample = DetectionSample(category, tuple(boxes), page.geometry)
            yield page.converted(f"{page.id}:{category}", sample, first[category])

    return _per_image(source, problems, _keep_box, make, categories=True)


def layout(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per page: every class with all its boxes."""

    def make(page: _Page) -> Iterator[Converted]:
        found: dict[str, list[Box]] = {}
        for _, category, box in page.boxes():
            found.setdefault(category, []).append(box)
        if found:
            regions = {category: tuple(boxes) for category, boxes in found.items()}
            yield page.converted(page.id, LayoutSample(regions, page.geometry), page.rows[0][0])

    return _per_image(source, problems, _keep_box, make, categories=True)


def pose(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per person with at least one annotated key point (its flag is not 0)."""

    def keep(record: dict[str, Any]) -> Any:
        values = a_list(record, "keypoints")
        if len(values) % 3 or not all(map(is_finite_number, values)):
            raise RecordError(f"'keypoints' must be triples of numbers, got {len(values)} values")
        return [an_id(record, "category_id"), a_list(record, "bbox"), values, str(record.get("id", ""))]

    def make(page: _Page) -> Iterator[Converted]:
        for line, (category_id, values, flat, annotation_id) in page.rows:
            try:
                names = a_list(_category(page.categories, category_id), "keypoints")
                if len(names) * 3 != len(flat):
                    raise RecordError(f"{len(flat) // 3} key points where the category names {len(names)}")
                triples = zip(names, flat[::3], flat[1::3], flat[2::3], strict=True)
                points = {str(name): Point(float(x), float(y)) for name, x, y, flag in triples if flag}
                if not points:
                    continue
                sample = PoseSample(Keypoints(points), box_of(values, page.geometry), page.geometry)
            except RecordError as error:
                page.problems.add(page.source.path, line, f"annotations: {error}")
                continue
            yield page.converted(annotation_id or f"{page.id}:{line}", sample, line)

    return _per_image(source, problems, keep, make, categories=True)


def caption(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per caption."""

    def make(page: _Page) -> Iterator[Converted]:
        for line, (text, annotation_id) in page.rows:
            yield page.converted(annotation_id or f"{page.id}:{line}", CaptionSample(text), line)

    def keep(record: dict[str, Any]) -> Any:
        return [a_text(record, "caption"), str(record.get("id", ""))]

    return _per_image(source, problems, keep, make, categories=False)
