"""SPHINX-nano's scores on pictures of many sizes and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.atomic import atomic_file
from sphinxkit.nano.stages.scores import MORE_ROWS, NUM_SCENES, ROWS, SCORES_FILE, SEED, TableRow, evaluate_nano

PICTURES_FILE = "any_size.json"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Size and shape of the pictures of one column of the table.

    Args:
        width: Width that scenes are drawn at, in pixels.
        height: Height that scenes are drawn at.
        shrink_to: (width, height) that they are shrunk to; None: as drawn.
    """

    width: int
    height: int
    shrink_to: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """As in 448x336, or in 256x128-128x64 where they are shrunk."""
        drawn = f"{self.width}x{self.height}"
        return drawn if self.shrink_to is None else f"{drawn}-{self.shrink_to[0]}x{self.shrink_to[1]}"


PICTURES = (
    Pictures(128, 128),
    *(Pictures(side, side) for side in (200, 448, 1000)),
    *(Pictures(side, side * 3 // 4) for side in (128, 200, 448, 1000)),
    *(Pictures(side, side // 2) for side in (128, 200, 448, 1000)),
    Pictures(256, 128, (128, 64)),
    Pictures(96, 96),
    Pictures(128, 128, (96, 96)),
)
"""The table's columns: squares, 4:3, 2:1 and the same shrunk to 64 pixels of height, 96 pixels and 128 shrunk to 96."""


def evaluate_any_size(
    model: str | Path,
    folder: str | Path,
    *,
    pictures: Sequence[Pictures] = PICTURES,
    rows: Sequence[TableRow] = (*ROWS, *MORE_ROWS),
    num_scenes: int = NUM_SCENES,
    seed: int = SEED,
    should_stop: Callable[[], bool] | None = None,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> bool:
    """Score a model on held-out scenes of every task at every size and write ``any_size.json``.

    A call resumes where an earlier one stopped.

    Args:
        model: Checkpoint.
        folder: Folder for scenes, predictions and scores.
        pictures: The table's columns.
        rows: The table's lines.
        num_scenes: Scenes of each task and size, one question each.
        seed: Seed of the scenes.
        should_stop: Asked between parts.
        report: Called with each score.
    Returns:
        Whether everything is scored.
    """
    place = Path(folder)
    found: dict[str, Any] = {"num_scenes": num_scenes, "seed": seed, "pictures": {}}
    for chosen in pictures:

        def told(record: Mapping[str, Any], name: str = chosen.name) -> None:
            if report is not None:
                report({"pictures": name, **record})

        if not evaluate_nano(
            model,
            place / chosen.name,
            rows=rows,
            num_scenes=num_scenes,
            baselines=False,
            size=(chosen.width, chosen.height),
            shrink_to=chosen.shrink_to,
            seed=seed,
            should_stop=should_stop,
            report=told,
        ):
            return False
        scores = json.loads((place / chosen.name / SCORES_FILE).read_text(encoding="utf-8"))
        found["model"] = scores["model"]
        found["pictures"][chosen.name] = {row["task"]: round(row["model"], 4) for row in scores["rows"].values()}
    with atomic_file(place / PICTURES_FILE) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return True


def any_size_table(after: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """The table of ``any_size.json`` in Markdown: pictures down, tasks across.

    Args:
        after: What is shown.
        before: Scores of other weights, shown before an arrow.
    """
    tasks = list(dict.fromkeys(task for row in after["pictures"].values() for task in row))
    lines = [f"| pictures | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, row in after["pictures"].items():
        old = {} if before is None else before["pictures"].get(name, {})
        cells = [
            f"{old[task]:.2f} → {row[task]:.2f}" if task in old else f"{row[task]:.2f}" if task in row else ""
            for task in tasks
        ]
        shown = name.replace("-", " shrunk to ").replace("x", " x ")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)
