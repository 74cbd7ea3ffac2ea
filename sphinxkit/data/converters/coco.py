"""COCO and data sets in its format: instances, key points, captions; LVIS; Objects365; PubLayNet and DocLayNet pages.

The file is read once; annotations are grouped by image on disk.
Source: cocodataset.org, data format; LVIS, arXiv:1908.03195; Objects365, ICCV 2019; PubLayNet, arXiv:1908.07836;
DocLayNet, arXiv:2206.01062.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
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
    last_parts,
    name_of,
)
from sphinxkit.data.converters.disk_tables import DiskTables
from sphinxkit.data.json_stream import is_finite_number, iter_json_members
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import CaptionSample, DetectionSample, Keypoints, LayoutSample, PoseSample
from sphinxkit.formatters.tasks.coordinates import check_point
from sphinxkit.geometry import Box, ImageGeometry, Point

KeepFields = Callable[[dict[str, Any]], Any]
ImageName = Callable[[dict[str, Any]], str]
Categories = dict[str, dict[str, Any] | None]  # by id; None: the id is there more than once, with different content


def _is_crowd(record: dict[str, Any]) -> bool:
    """Whether an annotation is of a crowd: ``iscrowd`` is 1, "1" or true; 0, "0", false or absent if not.

    Raises:
        RecordError: It is something else.
    """
    value = record.get("iscrowd")
    if value is None or value in (0, "0"):
        return False
    if value in (1, "1"):
        return True
    raise RecordError(f"'iscrowd' must be 0 or 1, got {value!r:.60}")


def _add_category(
    categories: Categories, record: dict[str, Any], problems: Problems, source: Source, line: int
) -> None:
    key, category = str(an_id(record, "id")), {**record, "name": a_text(record, "name")}
    if key not in categories:
        categories[key] = category
        return
    is_same = categories[key] == category
    what = "each time the same" if is_same else "with different content; what refers to it is left out"
    problems.add(source.path, line, f"categories: id {key} is there more than once, {what}")
    if not is_same:
        categories[key] = None


def _file_name(record: dict[str, Any]) -> str:
    return a_text(record, "file_name")


def _image(record: dict[str, Any], name: ImageName) -> list[Any]:
    """[path, width, height, ids of categories whose objects are not all annotated (LVIS)]."""
    partly = "not_exhaustive_category_ids"
    return [name(record), *a_size(record), a_list(record, partly) if partly in record else []]


def _fill(
    tables: DiskTables,
    source: Source,
    problems: Problems,
    keep: KeepFields,
    needs_categories: bool,
    image_name: ImageName,
) -> Categories:
    """Read the file: images into the tables, (id, ``keep(annotation)``) as rows by image; returns the categories."""
    categories: Categories = {}
    members = ["images", "annotations", *(["categories"] if needs_categories else [])]
    for member, item in iter_json_members(source.path, members, problems.on(source.path)):
        try:
            record = an_object(item.value)
            if member == "images":
                tables.put("images", an_id(record, "id"), _image(record, image_name), item.line)
            elif member == "categories":
                _add_category(categories, record, problems, source, item.line)
            elif not _is_crowd(record):
                name = "" if record.get("id") is None else str(record["id"])
                tables.add(an_id(record, "image_id"), item.line, [name, keep(record)])
        except RecordError as error:
            problems.add(source.path, item.line, f"{member}: {name_of(item.value, 'id')}{error}")
    tables.report_repeated("images", problems, source.path)
    return categories


def _category(categories: Categories, category_id: Any) -> dict[str, Any]:
    if str(category_id) not in categories:
        raise RecordError(f"category_id {category_id!r} is not among the categories")
    found = categories[str(category_id)]
    if found is None:
        raise RecordError(f"category_id {category_id!r} is there more than once, with different content")
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Annotation:
    """One annotation: its line, its id ("" without one) and what ``keep`` left of it."""

    line: int
    id: str
    kept: Any


def _per_image(
    source: Source,
    problems: Problems,
    keep: KeepFields,
    make: Callable[[_Page], Iterator[Converted]],
    *,
    categories: bool,
    image_name: ImageName = _file_name,
) -> Iterator[Converted]:
    with DiskTables() as tables:
        known = _fill(tables, source, problems, keep, categories, image_name)
        for image_id, rows in tables.groups():
            annotations = [_Annotation(line, name, kept) for line, (name, kept) in rows]
            try:
                image = tables.get("images", image_id)
                if image is None:
                    raise RecordError(f"id {image_id} is not among the images")
            except RecordError as error:
                for annotation in annotations:
                    _report(problems, source, annotation, f"image_{error}")
                continue
            unique = list(_without_repeated(annotations, problems, source))
            name, width, height, partly = image
            geometry = ImageGeometry(width, height)
            yield from make(_Page(source, problems, known, image_id, name, geometry, unique, partly))


def _report(problems: Problems, source: Source, annotation: _Annotation, reason: object) -> None:
    name = f"id {annotation.id}: " if annotation.id else ""
    problems.add(source.path, annotation.line, f"annotations: {name}{reason}")


def _without_repeated(annotations: Iterable[_Annotation], problems: Problems, source: Source) -> Iterator[_Annotation]:
    """One image's annotations; one that is there again, with the same id and content, is reported and left out."""
    seen: dict[str, Any] = {}
    for annotation in annotations:
        if annotation.id and annotation.id in seen and seen[annotation.id] == annotation.kept:
            _report(problems, source, annotation, "is there more than once, with the same content")
            continue
        seen[annotation.id] = annotation.kept
        yield annotation


@dataclasses.dataclass(frozen=True, slots=True)
class _Page:
    """One image with its annotations as ``keep`` left them."""

    source: Source
    problems: Problems
    categories: Categories
    id: str
    file_name: str
    geometry: ImageGeometry
    annotations: list[_Annotation]
    partly_annotated: list[Any]

    def boxes(self) -> Iterator[tuple[int, str, Box]]:
        """(line, category, box) of the annotations that can be used; none of a category that is annotated partly."""
        for annotation in self.annotations:
            category_id, values = annotation.kept
            if category_id in self.partly_annotated:
                continue
            try:
                category, box = str(_category(self.categories, category_id)["name"]), box_of(values, self.geometry)
            except RecordError as error:
                self.report(annotation, error)
                continue
            yield annotation.line, category, box

    def report(self, annotation: _Annotation, error: object) -> None:
        _report(self.problems, self.source, annotation, error)

    def converted(self, sample_id: str, sample: object, line: int) -> Converted:
        return Converted(sample_id, self.file_name, sample, self.source.path, line)


def _keep_box(record: dict[str, Any]) -> Any:
    return [an_id(record, "category_id"), a_list(record, "bbox")]


def detection(
    source: Source, problems: Problems, *, image_name: ImageName = _file_name, underscores: bool = True
) -> Iterator[Converted]:
    """One sample per image and category: all its boxes. Crowd regions are left out.

    Args:
        source: The annotation file.
        problems: Collects unusable records.
        image_name: The path of an image record.
        underscores: Keep underscores in a category's name; False: they become spaces.
    """

    def make(page: _Page) -> Iterator[Converted]:
        found: dict[str, list[Box]] = {}
        first: dict[str, int] = {}
        for line, name, box in page.boxes():
            category = name if underscores else name.replace("_", " ")
            found.setdefault(category, []).append(box)
            first.setdefault(category, line)
        for category, boxes in found.items():
            sample = DetectionSample(category, tuple(boxes), page.geometry)
            yield page.converted(f"{page.id}:{category}", sample, first[category])

    return _per_image(source, problems, _keep_box, make, categories=True, image_name=image_name)


def lvis(source: Source, problems: Problems) -> Iterator[Converted]:
    """As ``detection``; an image's path is the end of its ``coco_url`` ("train2017/000000391895.jpg").

    A category whose objects are not all annotated in an image (``not_exhaustive_category_ids``) is left out there.
    """

    def image_name(record: dict[str, Any]) -> str:
        return last_parts(a_text(record, "coco_url" if "coco_url" in record else "file_name"))

    return detection(source, problems, image_name=image_name, underscores=False)


def objects365(source: Source, problems: Problems) -> Iterator[Converted]:
    """As ``detection``; an image's path is its patch and its name, as the archives unpack."""
    return detection(source, problems, image_name=lambda record: last_parts(_file_name(record)))


def layout(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per page: every class with all its boxes."""

    def make(page: _Page) -> Iterator[Converted]:
        found: dict[str, list[Box]] = {}
        for _, category, box in page.boxes():
            found.setdefault(category, []).append(box)
        if found:
            regions = {category: tuple(boxes) for category, boxes in found.items()}
            yield page.converted(page.id, LayoutSample(regions, page.geometry), page.annotations[0].line)

    return _per_image(source, problems, _keep_box, make, categories=True)


def pose(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per person with at least one annotated key point (its flag is not 0).

    Unusable key points are reported and left out.
    """

    def keep(record: dict[str, Any]) -> Any:
        values = a_list(record, "keypoints")
        if len(values) % 3:
            raise RecordError(f"'keypoints' must be triples of numbers, got {len(values)} values")
        return [an_id(record, "category_id"), a_list(record, "bbox"), values]

    def make(page: _Page) -> Iterator[Converted]:
        for annotation in page.annotations:
            category_id, values, flat = annotation.kept
            try:
                names = a_list(_category(page.categories, category_id), "keypoints")
                if len(names) * 3 != len(flat):
                    raise RecordError(f"{len(flat) // 3} key points where the category names {len(names)}")
                box = box_of(values, page.geometry)
            except RecordError as error:
                page.report(annotation, error)
                continue
            points = dict(_points(page, annotation, names, flat))
            if points:
                sample = PoseSample(Keypoints(points), box, page.geometry)
                yield page.converted(annotation.id or f"{page.id}:{annotation.line}", sample, annotation.line)

    return _per_image(source, problems, keep, make, categories=True)


def _points(page: _Page, annotation: _Annotation, names: list[Any], flat: list[Any]) -> Iterator[tuple[str, Point]]:
    """(name, point) of a person's annotated key points that can be used; the others are reported."""
    for name, x, y, flag in zip(names, flat[::3], flat[1::3], flat[2::3], strict=True):
        if not all(map(is_finite_number, (x, y, flag))):
            page.report(annotation, f"key point {name}: expected three finite numbers, got {[x, y, flag]!r:.60}")
        elif flag:
            try:
                yield str(name), check_point("pose", Point(float(x), float(y)), page.geometry)
            except DataError as error:
                page.report(annotation, f"key point {name}: {error}")


def caption(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per caption."""

    def make(page: _Page) -> Iterator[Converted]:
        for annotation in page.annotations:
            sample = CaptionSample(annotation.kept)
            yield page.converted(annotation.id or f"{page.id}:{annotation.line}", sample, annotation.line)

    return _per_image(source, problems, lambda record: a_text(record, "caption"), make, categories=False)
