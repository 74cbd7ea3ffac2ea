"""Procedural world: scenes drawn from a seed, with exact annotations for every task, without data files."""

from sphinxkit.nano.world.composition import KINDS, SIZES, Style, compose
from sphinxkit.nano.world.export import annotation, export_annotations, export_records
from sphinxkit.nano.world.mixture import WorldMixture, WorldSample, WorldSource
from sphinxkit.nano.world.palette import COLORS
from sphinxkit.nano.world.render import render
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Domain, Rect, Scene
from sphinxkit.nano.world.shapes import SHAPES
from sphinxkit.nano.world.splits import (
    SPLIT_CLASSES,
    Split,
    is_held_out_layout,
    is_held_out_pair,
    is_held_out_pose,
    is_held_out_word,
    split_of,
)
from sphinxkit.nano.world.task_samples import KINDS_OF_TASK
from sphinxkit.nano.world.world import TASKS, TEXT_TASK, VERSION, World

__all__ = [
    "COLORS",
    "KINDS",
    "KINDS_OF_TASK",
    "SHAPES",
    "SIZES",
    "SPLIT_CLASSES",
    "TASKS",
    "TEXT_TASK",
    "VERSION",
    "Domain",
    "Rect",
    "Rng",
    "Scene",
    "Split",
    "Style",
    "World",
    "WorldMixture",
    "WorldSample",
    "WorldSource",
    "annotation",
    "compose",
    "export_annotations",
    "export_records",
    "is_held_out_layout",
    "is_held_out_pair",
    "is_held_out_pose",
    "is_held_out_word",
    "render",
    "split_of",
]
