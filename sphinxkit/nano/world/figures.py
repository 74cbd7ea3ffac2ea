"""Stick figures with COCO's 17 key points, drawn as maps of labels by integer arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sphinxkit.errors import DataError
from sphinxkit.nano.world.font import Mask
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.splits import is_held_out_pose

Facing = Literal["front", "back"]

# What a pixel of a figure is.
EMPTY, CLOTHES, SKIN, HAIR, FACE, JOINT = range(6)

NUM_DIRECTIONS = 32  # a limb's direction: 0 is down, 8 away from the body, 16 up
_QUARTER = (0, 200, 392, 569, 724, 851, 946, 1004, 1024)  # round(1024 sin(k pi / 16))

# Lengths in thousandths of the figure's height, chosen by eye.
HEAD_RADIUS, SHOULDER_HALF, HIP_HALF = 85, 95, 62
SHOULDER_Y, HIP_Y = 225, 530  # below the head's top
UPPER_ARM, FOREARM, THIGH, SHIN = 165, 160, 225, 225
EYE_X, EYE_Y, NOSE_Y = 36, -22, 22  # from the head's centre
THICKNESS, JOINT_DIAMETER = 50, 42
MIN_HEIGHT = 40  # pixels; below it the joints run into each other

Offset = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pose:
    """How a figure stands.

    Args:
        limbs: Directions of the right upper arm, right forearm, left upper arm, left forearm, right thigh, right shin,
            left thigh and left shin, each counted from straight down, away from the body. Right and left are the
            person's own.
        facing: ``front`` shows the face; from the ``back`` there are no nose and no eyes.
    """

    limbs: tuple[int, ...]
    facing: Facing


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn pose.

    Args:
        labels: What each pixel is (``EMPTY``, ``CLOTHES``, ...), cropped to the figure.
        points: COCO's name to the (x, y) of the pixel in ``labels`` at the middle of the drawn joint.
    Shape:
        labels: (height, width) uint8; every outer row and column has a pixel that is not ``EMPTY``
    """

    labels: NDArray[np.uint8]
    points: Mapping[str, Offset]

    def is_raised(self, side: str) -> bool:
        """Whether the wrist of an arm ("left" or "right") is above its shoulder by over a tenth of the figure."""
        rise = self.points[f"{side}_shoulder"][1] - self.points[f"{side}_wrist"][1]
        return rise * 10 > len(self.labels)


def draw_pose(rng: Rng, held_out: bool) -> Pose:
    """A pose that training sees, or one that it never does.

    Args:
        rng: Random choices.
        held_out: Whether training never sees it.
    """
    while True:
        limbs = []
        for _ in range(2):
            upper = rng.between(1, 14)
            limbs += [upper, min(max(upper + rng.between(-3, 5), 0), 17)]
        for _ in range(2):
            upper = rng.between(0, 4)
            limbs += [upper, max(upper - rng.between(0, 3), 0)]
        pose = Pose(tuple(limbs), "back" if rng.chance(25) else "front")
        if is_held_out_pose(pose.limbs, pose.facing) == held_out:
            return pose


def _direction(index: int) -> Offset:
    """(away from the body, down) of a direction, each 1024 long."""

    def sine(step: int) -> int:
        quarter, rest = divmod(step % NUM_DIRECTIONS, NUM_DIRECTIONS // 4)
        value = _QUARTER[rest] if quarter % 2 == 0 else _QUARTER[8 - rest]
        return value if quarter < 2 else -value

    return sine(index), sine(index + NUM_DIRECTIONS // 4)


def _moved(start: Offset, side: int, direction: int, length: int) -> Offset:
    away, down = _direction(direction)
    return start[0] + side * ((away * length) // 1024), start[1] + (down * length) // 1024


def joints(pose: Pose, height: int) -> dict[str, Offset]:
    """COCO's key points of a pose, from the top of the head; those that cannot be seen are left out.

    Args:
        pose: The pose.
        height: Height of the figure in pixels when it stands straight.
    """

    def scaled(thousandths: int) -> int:
        return thousandths * height // 1000

    facing_side = -1 if pose.facing == "front" else 1  # where the person's right is in the picture
    head_y = scaled(HEAD_RADIUS)
    points: dict[str, Offset] = {}
    if pose.facing == "front":
        points["nose"] = (0, head_y + scaled(NOSE_Y))
    for name, side in (("left", -facing_side), ("right", facing_side)):
        if pose.facing == "front":
            points[f"{name}_eye"] = (side * scaled(EYE_X), head_y + scaled(EYE_Y))
        points[f"{name}_ear"] = (side * scaled(HEAD_RADIUS), head_y)
        arm, leg = (pose.limbs[2:4], pose.limbs[6:8]) if name == "left" else (pose.limbs[0:2], pose.limbs[4:6])
        shoulder, hip = (side * scaled(SHOULDER_HALF), scaled(SHOULDER_Y)), (side * scaled(HIP_HALF), scaled(HIP_Y))
        elbow = _moved(shoulder, side, arm[0], scaled(UPPER_ARM))
        knee = _moved(hip, side, leg[0], scaled(THIGH))
        points |= {f"{name}_shoulder": shoulder, f"{name}_elbow": elbow, f"{name}_hip": hip, f"{name}_knee": knee}
        points[f"{name}_wrist"] = _moved(elbow, side, arm[1], scaled(FOREARM))
        points[f"{name}_ankle"] = _moved(knee, side, leg[1], scaled(SHIN))
    return points


@lru_cache(maxsize=8192)
def capsule(dx: int, dy: int, thickness: int) -> Mask:
    """Pixels within half the thickness of the line from (0, 0) to (dx, dy).

    Args:
        dx: In pixels, to the right.
        dy: In pixels, down.
        thickness: In pixels.
    Shape:
        return: (|dy| + 2 * reach + 1, |dx| + 2 * reach + 1) bool with reach = thickness // 2; the line begins ``reach``
            from the corner that it comes from
    """
    reach = thickness // 2
    x = np.arange(min(dx, 0) - reach, max(dx, 0) + reach + 1, dtype=np.int64)[None, :]
    y = np.arange(min(dy, 0) - reach, max(dy, 0) + reach + 1, dtype=np.int64)[:, None]
    along, length = x * dx + y * dy, dx * dx + dy * dy
    across = x * dy - y * dx
    near_line = (along >= 0) & (along <= length) & (4 * across**2 <= thickness**2 * length)
    near_ends = np.minimum(x**2 + y**2, (x - dx) ** 2 + (y - dy) ** 2) * 4 <= thickness**2
    mask: Mask = near_ends | near_line if length else near_ends
    return mask


def _stroke(labels: NDArray[np.uint8], start: Offset, end: Offset, thickness: int, label: int) -> None:
    mask = capsule(end[0] - start[0], end[1] - start[1], thickness)
    left, top = min(start[0], end[0]) - thickness // 2, min(start[1], end[1]) - thickness // 2
    labels[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = label


@lru_cache(maxsize=256)
def figure(pose: Pose, height: int) -> Figure:
    """Draw a pose.

    Args:
        pose: The pose.
        height: Height of the figure in pixels when it stands straight.
    Raises:
        DataError: It is less than ``MIN_HEIGHT``.
    """
    if height < MIN_HEIGHT:
        raise DataError(f"figures: a height of {height} pixels is too small, at least {MIN_HEIGHT} are needed")
    thickness = max(3, THICKNESS * height // 1000)
    joint = max(3, JOINT_DIAMETER * height // 1000)
    radius = HEAD_RADIUS * height // 1000
    relative = joints(pose, height)
    margin = thickness + joint
    left = margin + max(radius, -min(x for x, _ in relative.values()))
    top = margin - min(0, *(y for _, y in relative.values()))
    width = left + max(radius, *(x for x, _ in relative.values())) + margin + 1
    labels = np.zeros((top + max(y for _, y in relative.values()) + margin + 1, width), dtype=np.uint8)
    points = {name: (x + left, y + top) for name, (x, y) in relative.items()}
    centre = (left, top + radius)
    _stroke(labels, centre, (left, points["left_shoulder"][1]), thickness, SKIN)
    for side in ("left", "right"):
        for start, end, label in (
            ("shoulder", "elbow", CLOTHES),
            ("elbow", "wrist", SKIN),
            ("hip", "knee", CLOTHES),
            ("knee", "ankle", CLOTHES),
            ("shoulder", "hip", CLOTHES),
        ):
            _stroke(labels, points[f"{side}_{start}"], points[f"{side}_{end}"], thickness, label)
    _torso(labels, points)
    _stroke(labels, centre, centre, 2 * radius, SKIN if pose.facing == "front" else HAIR)
    for name, point in points.items():
        is_face = name in ("nose", "left_eye", "right_eye")
        dot = max(2, joint * 2 // 3) if is_face else joint
        _stroke(labels, point, point, dot, FACE if is_face else SKIN if name.endswith("ear") else JOINT)
    rows, columns = np.flatnonzero(labels.any(axis=1)), np.flatnonzero(labels.any(axis=0))
    cropped = np.ascontiguousarray(labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    cropped.setflags(write=False)
    return Figure(cropped, {name: (x - int(columns[0]), y - int(rows[0])) for name, (x, y) in points.items()})


def _torso(labels: NDArray[np.uint8], points: Mapping[str, Offset]) -> None:
    """Fill between shoulders and hips, row by row."""
    shoulders = sorted((points["left_shoulder"], points["right_shoulder"]))
    hips = sorted((points["left_hip"], points["right_hip"]))
    top, bottom = shoulders[0][1], hips[0][1]
    for y in range(top, bottom + 1):
        first, last = (s[0] + (h[0] - s[0]) * (y - top) // (bottom - top) for s, h in zip(shoulders, hips, strict=True))
        labels[y, first : last + 1] = CLOTHES
