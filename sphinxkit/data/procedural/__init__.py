"""A world to train in: scenes drawn from a seed, with exact annotations for every task, and no data files."""

from sphinxkit.data.procedural.composition import KINDS, SIZES, Style, compose
from sphinxkit.data.procedural.draws import Draws
from sphinxkit.data.procedural.export import annotation, export_annotations, export_records
from sphinxkit.data.procedural.mixture import WorldMixture, WorldSample, WorldSource
from sphinxkit.data.procedural.palette import COLORS
from sphinxkit.data.procedural.scene import Domain, Rect, Scene
from sphinxkit.data.procedural.shapes import SHAPES
from sphinxkit.data.procedural.splits import (
    SPLIT_CLASSES,
    Split,
    is_held_out_layout,
    is_held_out_pair,
    is_held_out_pose,
    is_held_out_word,
    split_of,
)
from sphinxkit.data.procedural.task_samples import KINDS_OF_TASK
from sphinxkit.data.procedural.world import TASKS, TEXT_TASK, VERSION, World

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
    "Draws",
    "Rect",
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
    "split_of",
]
