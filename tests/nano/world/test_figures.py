from __future__ import annotations

import itertools

import numpy as np
import pytest

from sphinxkit.errors import DataError
from sphinxkit.formatters.tasks import COCO_KEYPOINTS
from sphinxkit.nano.world.figures import FACE, JOINT, SKIN, Pose, capsule, draw_pose, figure, joints
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.splits import is_held_out_pose

DOWN = Pose((0, 0, 0, 0, 0, 0, 0, 0), "front")


def test_key_points_lie_on_their_joints() -> None:
    for index in range(60):
        pose = draw_pose(Rng("pose", index), held_out=False)
        drawn = figure(pose, 45 + index)
        hidden = {"nose", "left_eye", "right_eye"} if pose.facing == "back" else set()
        assert set(drawn.points) == set(COCO_KEYPOINTS) - hidden
        for name, (x, y) in drawn.points.items():
            expected = FACE if name in ("nose", "left_eye", "right_eye") else SKIN if name.endswith("ear") else JOINT
            on_top = {FACE, JOINT, SKIN}  # another joint may be drawn over this one
            others = [point for other, point in drawn.points.items() if other != name]
            near = any(abs(x - u) + abs(y - v) < 6 for u, v in others)
            assert drawn.labels[y, x] == expected or (near and drawn.labels[y, x] in on_top)


def test_a_figure_reaches_its_edges() -> None:
    for index in range(40):
        labels = figure(draw_pose(Rng("edges", index), held_out=True), 60).labels
        assert labels[0].any()
        assert labels[-1].any()
        assert labels[:, 0].any()
        assert labels[:, -1].any()


def test_left_and_right_are_the_persons_own() -> None:
    front, back = joints(DOWN, 100), joints(Pose(DOWN.limbs, "back"), 100)
    assert front["left_shoulder"][0] > 0 > front["right_shoulder"][0]
    assert back["left_shoulder"][0] < 0 < back["right_shoulder"][0]
    assert front["left_eye"][0] > 0 > front["right_eye"][0]


def test_directions_by_hand() -> None:
    points = joints(Pose((8, 16, 0, 0, 0, 0, 4, 0), "front"), 1000)
    assert points["right_shoulder"] == (-95, 225)
    assert points["right_elbow"] == (-95 - 165, 225)  # away from the body
    assert points["right_wrist"] == (-95 - 165, 225 - 160)  # up
    assert points["left_elbow"] == (95, 225 + 165)  # down
    assert points["left_knee"] == (62 + 724 * 225 // 1024, 530 + 724 * 225 // 1024)  # half way between


def test_raised_arms() -> None:
    assert not figure(DOWN, 80).is_raised("left")
    up = figure(Pose((14, 16, 0, 0, 0, 0, 0, 0), "front"), 80)
    assert up.is_raised("right")
    assert not up.is_raised("left")


def test_poses_are_of_the_split_that_is_asked_for() -> None:
    for held_out, index in itertools.product((False, True), range(30)):
        pose = draw_pose(Rng("split", index), held_out)
        assert is_held_out_pose(pose.limbs, pose.facing) == held_out


def test_a_capsule_is_every_pixel_near_the_line() -> None:
    for dx, dy, thickness in ((7, 3, 4), (-5, 9, 3), (0, 0, 5), (0, -6, 4)):
        mask, reach = capsule(dx, dy, thickness), thickness // 2
        for row, column in np.ndindex(*mask.shape):
            x, y = column + min(dx, 0) - reach, row + min(dy, 0) - reach
            length = dx * dx + dy * dy
            along = min(max((x * dx + y * dy) / length, 0), 1) if length else 0
            distance = np.hypot(x - along * dx, y - along * dy)
            if abs(distance - thickness / 2) > 1e-9:  # on the very edge floating point cannot tell
                assert mask[row, column] == (distance < thickness / 2)


def test_too_small_a_figure() -> None:
    with pytest.raises(DataError, match="a height of 39 pixels is too small"):
        figure(DOWN, 39)
