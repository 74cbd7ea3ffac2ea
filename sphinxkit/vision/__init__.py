"""Everything between pixels and the language model's input: views, branches of encoders, image delimiters."""

from __future__ import annotations

from sphinxkit.vision.branch import VisionBranch
from sphinxkit.vision.tower import MAX_VIEWS, VisionTower

__all__ = ["MAX_VIEWS", "VisionBranch", "VisionTower"]
