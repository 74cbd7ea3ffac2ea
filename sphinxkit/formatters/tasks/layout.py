"""Document layout analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, Example, GroundedPhrase, ParseResult, Task, register
from sphinxkit.formatters.tasks.grounding import Scanner, read_group, write_grounded
from sphinxkit.geometry import Box, ImageGeometry

PUBLAYNET_CLASSES = ("text", "title", "list", "table", "figure")
"""In the order of their category ids. Source: Zhong et al., PubLayNet, arXiv:1908.07836, table 1 and its COCO files."""

DOCLAYNET_CLASSES = (
    "Caption",
    "Footnote",
    "Formula",
    "List-item",
    "Page-footer",
    "Page-header",
    "Picture",
    "Section-header",
    "Table",
    "Text",
    "Title",
)
"""In the order of their category ids. Source: Pfitzmann et al., DocLayNet, arXiv:2206.01062, table 1."""

CLASS_SETS: Mapping[str, tuple[str, ...]] = {"publaynet": PUBLAYNET_CLASSES, "doclaynet": DOCLAYNET_CLASSES}


@dataclass(frozen=True, slots=True)
class LayoutSample:
    """The parts of a page.

    Args:
        regions: Class to its boxes, in original pixels.
        geometry: The image's size.
    """

    regions: Mapping[str, tuple[Box, ...]]
    geometry: ImageGeometry


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", " ").replace("_", " ")


@register("layout")
class Layout(Task[LayoutSample, GroundedPhrase]):
    """Document layout: every class that the page has, in the classes' order, with its boxes.

    Args:
        classes: "publaynet", "doclaynet" or the classes themselves; the instruction names them, so that different sets
            of classes do not collide.
    Raises:
        DataError: The set is unknown, empty, or two of its classes are the same but for case and hyphens.
    Source: our choice of words, in the style of detection's.
    """

    name = "layout"
    metric = "layout_f1"
    wordings = (
        "Detect all {classes} shown in the image.",
        "Give the bounding boxes of the parts of this page: {classes}.",
    )

    def __init__(self, classes: str | Sequence[str] = "publaynet") -> None:
        if isinstance(classes, str):
            if classes not in CLASS_SETS:
                raise DataError(
                    f"task {self.name!r}: classes {classes!r}, expected a list or one of {list(CLASS_SETS)}"
                )
            classes = CLASS_SETS[classes]
        self.classes = tuple(classes)
        self._by_plain_name = {_plain(name): name for name in self.classes}
        if not self.classes or len(self._by_plain_name) != len(self.classes) or not all(self._by_plain_name):
            raise DataError(f"task {self.name!r}: classes must be named and different, got {list(self.classes)}")

    def prompt(self, wording: int = 0) -> str:
        """The instruction.

        Raises:
            DataError: There is no such wording.
        """
        listed = ", ".join(self.classes[:-1])
        return self.instruction(wording, classes=f"{listed} and {self.classes[-1]}" if listed else self.classes[-1])

    def format(self, sample: LayoutSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: A class is unknown, none has a box, a box is not inside the image, or there is no such wording.
        """
        written = [write_grounded(self.name, region, sample.geometry) for region in self.items(sample)]
        return Example(self.prompt(wording), " ".join(written))

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[GroundedPhrase]:
        """Each class once, in the answer's order, with its boxes in original pixels."""
        log = ErrorLog(text)
        found: dict[str, list[Box]] = {}
        for group in Scanner(log, running_text=False).groups():
            boxes = read_group(log, group, geometry)
            name = self._by_plain_name.get(_plain(group.phrase or ""))
            if name is None:
                kind = "missing_phrase" if group.phrase is None else "unknown_name"
                log.add(kind, group.start, group.end, is_repaired=False)
            elif boxes is not None:
                if name != group.phrase:
                    log.add("wording", group.start, group.end, is_repaired=True)
                if name in found:
                    log.add("duplicate", group.start, group.end, is_repaired=True)
                found.setdefault(name, []).extend(boxes)
        if not found:
            log.add_empty()
        items = tuple(GroundedPhrase(name, tuple(boxes)) for name, boxes in found.items())
        return ParseResult(items, tuple(log.errors))

    def items(self, sample: LayoutSample) -> tuple[GroundedPhrase, ...]:
        """The classes that the page has, in the classes' order.

        Raises:
            DataError: A class is unknown, or no class has a box.
        """
        unknown = sorted(set(sample.regions) - set(self.classes))
        if unknown:
            raise DataError(
                f"task {self.name!r}: class {unknown[0]!r} is unknown; the classes are {list(self.classes)}"
            )
        items = [GroundedPhrase(name, tuple(sample.regions[name])) for name in self.classes if sample.regions.get(name)]
        if not items:
            raise DataError(f"task {self.name!r}: the page has no part")
        return tuple(items)
