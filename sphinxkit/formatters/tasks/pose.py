"""Human pose estimation."""

from __future__ import annotations

from dataclasses import dataclass

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks.base import ErrorLog, Example, Keypoints, ParseResult, Task, register
from sphinxkit.formatters.tasks.coordinates import check_point, read_points, write_boxes, write_point
from sphinxkit.formatters.tasks.grounding import Scanner, write_phrase
from sphinxkit.geometry import Box, ImageGeometry, Point

COCO_KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
"""COCO's key points of a person, in its order. Source: COCO 2017, person_keypoints_*.json, categories[0].keypoints."""


@dataclass(frozen=True, slots=True)
class PoseSample:
    """A person's key points.

    Args:
        keypoints: Those that are visible, in original pixels.
        box: Around the person, in original pixels.
        geometry: The image's size.
    """

    keypoints: Keypoints
    box: Box
    geometry: ImageGeometry


@register("pose")
class Pose(Task[PoseSample, Keypoints]):
    """Human pose: COCO key points of the person in a region; those that cannot be seen are left out.

    Source: the SPHINX authors' published prompts (default wording); the other wording is our choice.
    """

    name = "pose"
    metric = "pck"
    wordings = (
        "Detect the key points of the person in the region {box}.",
        "Where are the joints of the person in the region {box}?",
    )

    def prompt(self, box: Box, geometry: ImageGeometry, wording: int = 0) -> str:
        """The instruction.

        Args:
            box: Around the person, in original pixels.
            geometry: The image's size.
            wording: Index of the wording.
        Raises:
            DataError: The box is not inside the image, or there is no such wording.
        """
        return self.instruction(wording, box=write_boxes(self.name, [box], geometry))

    def format(self, sample: PoseSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: There is no point or one with a name that COCO lacks, a point or the box is not inside the image,
                or there is no such wording.
        """
        (keypoints,) = self.items(sample)
        answer = " ".join(
            write_phrase(self.name, name, write_point(self.name, point, sample.geometry))
            for name, point in keypoints.points.items()
        )
        return Example(self.prompt(sample.box, sample.geometry, wording), answer)

    def parse(self, text: str, geometry: ImageGeometry) -> ParseResult[Keypoints]:
        """The points by their names, in original pixels; one item, or none if there is no point."""
        log = ErrorLog(text)
        scanner = Scanner(log, running_text=False)
        found: dict[str, Point] = {}
        for group in scanner.groups():
            if group.phrase is None:
                log.add("missing_phrase", group.start, group.end, is_repaired=False)
                continue
            name = group.phrase.strip().lower().replace(" ", "_").replace("-", "_")
            if name not in COCO_KEYPOINTS:
                log.add("unknown_name", group.start, group.end, is_repaired=False)
                continue
            if name != group.phrase:
                log.add("wording", group.start, group.end, is_repaired=True)
            points = [point for start, end in group.lists for point in read_points(log, start, end, geometry)]
            if len(points) > 1:
                log.add("wrong_count", group.start, group.end, is_repaired=False)
            elif points and name in found:
                log.add("duplicate", group.start, group.end, is_repaired=False)
            elif points:
                found[name] = points[0]
        if not found:
            log.add_empty()
        return ParseResult((Keypoints(found),) if found else (), tuple(log.errors))

    def items(self, sample: PoseSample) -> tuple[Keypoints, ...]:
        """The points in COCO's order, inside the image.

        Raises:
            DataError: There is no point, one with a name that COCO lacks, or one that is not inside the image.
        """
        points = sample.keypoints.points
        unknown = sorted(set(points) - set(COCO_KEYPOINTS))
        if unknown or not points:
            raise DataError(f"task {self.name!r}: no key points, or not COCO's: {unknown}")
        inside = {n: check_point(self.name, points[n], sample.geometry) for n in COCO_KEYPOINTS if n in points}
        return (Keypoints(inside),)
