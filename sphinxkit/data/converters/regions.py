"""Regions and phrases: RefCOCO(+/g), Visual Genome, Flickr30k Entities.

Source: github.com/lichengunc/refer; visualgenome.org/api; Plummer et al., Flickr30k Entities, arXiv:1505.04870.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sphinxkit.data.converters.base import (
    Converted,
    Problems,
    RecordError,
    Source,
    a_list,
    a_number,
    a_size,
    a_text,
    an_id,
    an_object,
    box_of,
    last_parts,
    name_of,
)
from sphinxkit.data.converters.disk_tables import DiskTables
from sphinxkit.data.json_stream import iter_json, iter_json_members
from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import (
    GroundedCaptionSample,
    GroundedPhrase,
    QuestionSample,
    RegionSample,
    RelationSample,
)
from sphinxkit.geometry import Box, ImageGeometry

_ENTITY = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")


class _Memo(dict[int, Any]):
    """What a pickle may refer back to; its numbers count from 0."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: int, value: Any) -> None:
        if key >= self.limit:
            raise pickle.UnpicklingError(f"it numbers an object {key} and has {self.limit} bytes")
        super().__setitem__(key, value)


class _PlainUnpickler(pickle._Unpickler):
    """Reads containers, numbers and texts; refuses every class and function.

    It is the one in Python: that in C makes a table as long as the largest number of a reference, whatever it is.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.memo = _Memo(len(data))

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def _read_refs(folder: Path) -> tuple[Path, list[Any]]:
    """The ``refs(...)`` file of a RefCOCO folder: the published pickle, or the same list as JSON."""
    files = sorted([*folder.glob("refs*.p"), *folder.glob("refs*.json")])
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise DataError(f"{folder}: expected one refs(...).p or refs*.json, found {names}; give the file as companion")
    return files[0], _load_refs(files[0])


def _load_refs(path: Path) -> list[Any]:
    if path.suffix == ".json":
        return [item.value for item in iter_json(path)]
    try:
        refs = _PlainUnpickler(path.read_bytes()).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: not a pickle of plain data: {error}") from error
    if not isinstance(refs, list):
        raise DataError(f"{path}: expected a list of referring expressions, got {type(refs).__name__}")
    return refs


def refcoco(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per sentence, for finding the region or describing it.

    The source is the data set's folder (instances.json and refs(unc).p or a JSON of the same list), or instances.json
    with the refs file as companion. The pickle is read without allowing any class.
    """
    folder = source.path
    path, refs = (source.companion, _load_refs(source.companion)) if source.companion else _read_refs(folder)
    instances = folder / "instances.json" if folder.is_dir() else folder
    with DiskTables() as tables:
        for member, item in iter_json_members(instances, ["images", "annotations"], problems.on(instances)):
            try:
                record = an_object(item.value)
                if member == "images":
                    tables.put("images", an_id(record, "id"), [a_text(record, "file_name"), *a_size(record)], item.line)
                else:
                    tables.put("annotations", an_id(record, "id"), a_list(record, "bbox"), item.line)
            except RecordError as error:
                problems.add(instances, item.line, f"{member}: {name_of(item.value, 'id')}{error}")
        for space in ("images", "annotations"):
            tables.report_repeated(space, problems, instances)
        for index, ref in enumerate(refs):
            try:
                record = an_object(ref)
                if source.split is not None and record.get("split") != source.split:
                    continue
                image = tables.get("images", an_id(record, "image_id"))
                values = tables.get("annotations", an_id(record, "ann_id"))
                if image is None or values is None:
                    ids = f"image_id {record['image_id']} or ann_id {record['ann_id']}"
                    raise RecordError(f"{ids} is not in {instances.name}")
                geometry = ImageGeometry(*image[1:])
                box = box_of(values, geometry)
                for sentence in a_list(record, "sentences"):
                    phrase = a_text(an_object(sentence), "sent")
                    sample_id = str(sentence.get("sent_id", f"{record.get('ref_id', index)}:{phrase}"))
                    yield Converted(sample_id, image[0], RegionSample(phrase, box, geometry), path, 0)
            except RecordError as error:
                problems.add(path, 0, f"expression {index}: {name_of(ref, 'ref_id')}{error}")


def _genome_images(tables: DiskTables, source: Source, problems: Problems) -> None:
    path = source.companion or source.path.with_name("image_data.json")
    for item in iter_json(path, problems.on(path)):
        try:
            record = an_object(item.value)
            key = an_id(record, "image_id" if "image_id" in record else "id")
            name = last_parts(str(record.get("url", ""))) or f"{key}.jpg"
            tables.put("images", key, [name, *a_size(record)], item.line)
        except RecordError as error:
            problems.add(path, item.line, f"{name_of(item.value, 'image_id', 'id')}{error}")
    tables.report_repeated("images", problems, path)


def _genome(
    source: Source,
    problems: Problems,
    member: str,
    id_key: str,
    make: Callable[[dict[str, Any], ImageGeometry], object],
) -> Iterator[Converted]:
    with DiskTables() as tables:
        _genome_images(tables, source, problems)
        for item in iter_json(source.path, problems.on(source.path)):
            try:
                record = an_object(item.value)
                image_id = an_id(record, "image_id" if "image_id" in record else "id")
                image = tables.get("images", image_id)
                if image is None:
                    raise RecordError("the image is not in image_data.json")
                entries = a_list(record, member)
            except RecordError as error:
                problems.add(source.path, item.line, f"{name_of(item.value, 'image_id', 'id')}{error}")
                continue
            geometry = ImageGeometry(*image[1:])
            for index, entry in enumerate(entries):
                try:
                    sample = make(an_object(entry), geometry)
                    sample_id = str(entry.get(id_key, f"{image_id}:{index}"))
                except RecordError as error:
                    name = name_of(entry, id_key) or f"entry {index}: "
                    problems.add(source.path, item.line, f"{member} of image {image_id}: {name}{error}")
                    continue
                yield Converted(sample_id, image[0], sample, source.path, item.line)


def _genome_box(record: dict[str, Any], geometry: ImageGeometry) -> Box:
    sides = ("width", "height") if "width" in record else ("w", "h")
    return box_of([a_number(record, key) for key in ("x", "y", *sides)], geometry)


def genome_regions(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per region of region_descriptions.json, for finding it or describing it.

    image_data.json (image sizes) is in the same folder or given as companion.
    """

    def make(region: dict[str, Any], geometry: ImageGeometry) -> RegionSample:
        return RegionSample(a_text(region, "phrase"), _genome_box(region, geometry), geometry)

    return _genome(source, problems, "regions", "region_id", make)


def _named(value: Any, geometry: ImageGeometry) -> GroundedPhrase:
    record = an_object(value)
    names = record.get("names")
    first = {"name": names[0]} if isinstance(names, list) and names else record
    return GroundedPhrase(a_text(first, "name"), (_genome_box(record, geometry),))


def genome_relations(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per relationship of relationships.json; image_data.json beside it or as companion."""

    def make(relation: dict[str, Any], geometry: ImageGeometry) -> RelationSample:
        subject, target = (_named(relation.get(side), geometry) for side in ("subject", "object"))
        return RelationSample(subject, a_text(relation, "predicate").lower(), target, geometry)

    return _genome(source, problems, "relationships", "relationship_id", make)


def genome_questions(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per question of question_answers.json; image_data.json beside it or as companion."""

    def make(question: dict[str, Any], geometry: ImageGeometry) -> QuestionSample:
        return QuestionSample(a_text(question, "question"), a_text(question, "answer"))

    return _genome(source, problems, "qas", "qa_id", make)


def _flickr_boxes(path: Path, problems: Problems) -> tuple[ImageGeometry, dict[str, list[Box]]]:
    """The image's size and the boxes by entity id of one annotation file; a bad box is reported and left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from error
    if "<!DOCTYPE" in text:
        raise RecordError(f"{path.name} has a DOCTYPE, which is not allowed")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - a DOCTYPE, the dangerous part, is refused
        geometry = ImageGeometry(int(root.findtext("size/width", "")), int(root.findtext("size/height", "")))
    except (ElementTree.ParseError, ValueError) as error:
        raise RecordError(f"{path.name}: {error}") from error
    boxes: dict[str, list[Box]] = {}
    for entry in root.findall("object"):
        entities = [name.text or "" for name in entry.findall("name")]
        for bound in entry.findall("bndbox"):
            try:
                x1, y1, x2, y2 = (int(bound.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
                # corners are pixels, from 1, both inside the box
                box = box_of([x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], geometry)
            except (RecordError, ValueError) as error:
                problems.add(path, 0, f"entity {', '.join(entities)}: {error}")
                continue
            for entity in entities:
                boxes.setdefault(entity, []).append(box)
    return geometry, boxes


def read_entities(sentence: str) -> tuple[str, list[tuple[int, int, str]]]:
    """A sentence in the entities' notation as (plain text, (start, end, entity id) of each phrase)."""
    parts: list[str] = []
    spans = []
    length = position = 0
    for match in _ENTITY.finditer(sentence):
        before = sentence[position : match.start()]
        start = length + len(before)
        parts += [before, match.group(2)]
        length = start + len(match.group(2))
        spans.append((start, length, match.group(1)))
        position = match.end()
    return "".join([*parts, sentence[position:]]), spans


def flickr30k(source: Source, problems: Problems) -> Iterator[Converted]:
    """One sample per sentence; the source is the folder of ``Sentences`` and ``Annotations``.

    Entities without boxes (scenes, non-visual ones) stay plain words. ``split``: only the images named in
    ``<split>.txt``.
    """
    wanted = None
    if source.split is not None:
        try:
            wanted = set((source.path / f"{source.split}.txt").read_text(encoding="utf-8").split())
        except OSError as error:
            raise DataError(f"{source.path / (source.split + '.txt')}: cannot be read: {error.strerror}") from error
    if not (source.path / "Sentences").is_dir():
        raise DataError(f"{source.path}: expected the folders Sentences and Annotations")
    for path in sorted((source.path / "Sentences").glob("*.txt")):
        if wanted is not None and path.stem not in wanted:
            continue
        try:
            geometry, boxes = _flickr_boxes(source.path / "Annotations" / f"{path.stem}.xml", problems)
        except RecordError as error:
            problems.add(path, 1, str(error))
            continue
        for number, raw in enumerate(path.read_bytes().splitlines(), 1):
            try:
                text, spans = read_entities(raw.decode().strip())
            except UnicodeDecodeError as error:
                problems.add(path, number, f"not UTF-8: {error.reason} at byte {error.start} of the line")
                continue
            if not text:
                problems.add(path, number, "the sentence is empty")
                continue
            phrases = tuple(
                GroundedPhrase(text[start:end], tuple(boxes[entity]), start)
                for start, end, entity in spans
                if entity in boxes
            )
            sample = GroundedCaptionSample(text, phrases, geometry)
            yield Converted(f"{path.stem}:{number}", f"{path.stem}.jpg", sample, path, number)
