"""The procedural world: any number of scenes with exact annotations, from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sphinxkit.data.conversations import write_conversation
from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.formatters.coordinate_grid import move_to_grid
from sphinxkit.geometry import Point
from sphinxkit.nano.world.composition import MIN_SIDE, Style, compose
from sphinxkit.nano.world.everyday import everyday
from sphinxkit.nano.world.prose import lookups, prose
from sphinxkit.nano.world.render import render
from sphinxkit.nano.world.rng import Rng
from sphinxkit.nano.world.scene import Domain, Scene
from sphinxkit.nano.world.task_samples import KINDS_OF_TASK, MAKERS, Weights
from sphinxkit.registry import suggest

VERSION = 1
"""Changes whenever a seed gives other scenes of up to 255 pixels."""

TEXT_TASK = "text"
"""Names plain text where a task's name is expected."""

ALL_TASKS = "all"
"""Names conversations of several tasks about one scene where a task's name is expected."""

TASKS = (*KINDS_OF_TASK, TEXT_TASK)
TASK_WEIGHTS: Mapping[str, int] = {
    "vqa": 6,
    "rec": 4,
    "reg": 3,
    "detection": 4,
    "grounded_caption": 3,
    "text_detection": 4,
    "pose": 3,
    "layout": 4,
    "chart": 2,
    "relation": 1,
    "multiple_choice": 1,
    "vizwiz": 1,
    "detailed_caption": 1,
    "caption": 1,
    "classification": 1,
}
"""How often each task is drawn, among those that a scene has samples of, for conversations of all tasks; our choice."""

KIND_WEIGHTS: Weights = (
    ("shapes", 6),
    ("mixed", 4),
    ("texts", 3),
    ("people", 3),
    ("page", 3),
    ("chart", 2),
    ("single", 1),
)
"""The kinds of scenes of conversations of all tasks; our choice."""

_QUESTION_TASKS = ("vqa", "vizwiz", "multiple_choice")
MAX_ATTEMPTS = 200  # scenes that are drawn until one has a sample of the task; one in three has at least


def on_grid(sample: tasks.PoseSample, steps: int) -> tasks.PoseSample:
    """The sample with every key point moved to the left and up, to a whole step of the padded square's side.

    Args:
        sample: Any.
        steps: Along the square's side.
    """
    geometry = sample.geometry

    def move(point: Point) -> Point:
        told = geometry.point_to_square(point)
        moved = Point(math.floor(told.x * steps) / steps, math.floor(told.y * steps) / steps)
        return geometry.clip_point(geometry.point_to_pixels(moved))

    points = {name: move(point) for name, point in sample.keypoints.points.items()}
    return replace(sample, keypoints=tasks.Keypoints(points))


def _reworded(task: str, wording: str) -> tasks.Task[Any, Any]:
    """A task with one instruction, which is not its own."""
    own = type(tasks.create(task))
    changed: tasks.Task[Any, Any] = type(own.__name__, (own,), {"wordings": (wording,)})()
    return changed


def _cut(sample: tasks.MultipleChoiceSample, num_letters: int) -> tasks.MultipleChoiceSample:
    """The sample with the beginnings of its choices, each once."""
    choices = tuple(dict.fromkeys(choice[:num_letters] for choice in sample.choices))
    return replace(sample, choices=choices, answer=choices.index(sample.choices[sample.answer][:num_letters]))


class DrawnScene(Scene):
    """A scene with its picture."""

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """The picture, drawn when it is first asked for.

        Shape:
            return: (height, width, 3) uint8, red, green, blue
        """
        return render(self)


class World:
    """Scenes, samples and conversations by number; every one is a function of the arguments and its number.

    Args:
        domain: ``real`` (texture, noise, short and partly wrong captions) or ``synthetic`` (clean, template captions).
        split: ``train``, ``val`` (other scenes alike) or ``test`` (other scenes, made of what training never sees);
            see ``splits``.
        size: Size of the pictures in pixels: a square's side, or (width, height).
        seed: Another seed, other scenes.
        max_objects: Shapes in a scene at most.
        sizes: Names of the shapes' sizes; see ``composition.SIZES``.
        has_small_text: Set words at half the size.
        has_all_wordings: Draw among each task's wordings; else the default one.
        point_grid: Conversations tell boxes and key points in whole steps of 1/``point_grid`` of the padded square's
            side; None: exactly. Boxes are rounded; key points, the middles of pixels, move to the left and up. (A small
            tokenizer has not that many coordinates.)
        long_sides: The least and the most pixels of a picture's longer side, drawn for every scene; None: every picture
            is of ``size``.
        max_aspect: With ``long_sides``: the longer side is at most ``max_aspect`` percent of the shorter one, upright
            or lying; two in five pictures are square. No side is below ``composition.MIN_SIDE``.
        everyday_percent: Questions in everyday words; see ``everyday``.
        rounds: How often a scene of one task is asked about; from the second time on questions come again, with their
            choices in another order.
        told_first_percent: Multiple-choice questions that come after the same question without choices, which is
            answered: an easier task to begin with.
        context_percent: Multiple-choice questions whose context says the answer: an exercise in finding its letter,
            which needs no picture.
        question_starts: Of ``vqa``, ``vizwiz`` and ``multiple_choice`` only questions that begin with one of these;
            empty: all.
        has_lookups: Plain texts are lists of choices, and which letter each has.
        choice_letters: Choices of multiple choice are cut after so many letters, those that are then alike left out: an
            easier task to begin with; None: whole.
        wordings: Task to the instruction that takes the place of its own, with its own's fields in braces.
    Raises:
        DataError: One of them is not possible.
    """

    def __init__(
        self,
        domain: Domain = "synthetic",
        split: str = "train",
        size: int | tuple[int, int] = 112,
        seed: int = 0,
        *,
        max_objects: int = 6,
        sizes: tuple[str, ...] = ("small", "medium", "large"),
        has_small_text: bool = False,
        has_all_wordings: bool = False,
        point_grid: int | None = None,
        wordings: Mapping[str, str] | None = None,
        long_sides: Sequence[int] | None = None,
        max_aspect: int = 200,
        everyday_percent: int = 0,
        rounds: int = 1,
        told_first_percent: int = 0,
        context_percent: int = 0,
        question_starts: Sequence[str] = (),
        has_lookups: bool = False,
        choice_letters: int | None = None,
    ) -> None:
        if point_grid is not None and point_grid < 1:
            raise DataError(f"world: point_grid must be at least 1, got {point_grid}")
        if long_sides is not None and not (len(long_sides) == 2 and MIN_SIDE <= long_sides[0] <= long_sides[1]):
            raise DataError(f"world: long_sides must be two numbers from {MIN_SIDE} in order, got {list(long_sides)}")
        if max_aspect < 100 or not 0 <= everyday_percent <= 100:
            raise DataError(
                f"world: max_aspect must be at least 100 and everyday_percent a percentage, got {max_aspect} and "
                f"{everyday_percent}"
            )
        if rounds < 1 or not (0 <= told_first_percent <= 100 and 0 <= context_percent <= 100):
            raise DataError(
                f"world: rounds must be at least 1, told_first_percent and context_percent percentages, got {rounds}, "
                f"{told_first_percent} and {context_percent}"
            )
        if choice_letters is not None and choice_letters < 1:
            raise DataError(f"world: choice_letters must be at least 1, got {choice_letters}")
        if isinstance(question_starts, str):
            raise DataError(f"world: question_starts must be a list of beginnings, got {question_starts!r}")
        width, height = (size, size) if isinstance(size, int) else size
        self.style = Style(width, height, domain, split, max_objects, tuple(sizes), has_small_text)
        self.seed = seed
        self.has_all_wordings = has_all_wordings
        self.point_grid = point_grid
        self.long_sides = None if long_sides is None else (long_sides[0], long_sides[1])
        self.max_aspect, self.everyday_percent = max_aspect, everyday_percent
        self.rounds, self.told_first_percent, self.context_percent = rounds, told_first_percent, context_percent
        self.question_starts, self.has_lookups = tuple(question_starts), has_lookups
        self.choice_letters = choice_letters
        self.name = f"{domain}-{split}-{width}x{height}-{seed}"
        self.wordings = dict(wordings or {})
        unknown = [task for task in self.wordings if task not in MAKERS]
        if unknown:
            raise DataError(
                f"world: wordings: there is no task {unknown[0]!r}{suggest(unknown[0], MAKERS, self.wordings)}"
            )
        self._formatters: dict[str | tuple[str, str], tasks.Task[Any, Any]] = {
            task: _reworded(task, wording) for task, wording in self.wordings.items()
        }

    def __repr__(self) -> str:
        return f"World({self.name})"

    def _rng(self, *parts: object) -> Rng:
        return Rng("sphinxkit.world", VERSION, self.seed, self.style.domain, self.style.split, *parts)

    def _style(self, index: int) -> Style:
        """The style of scene ``index``, with the size of its picture."""
        if self.long_sides is None:
            return self.style
        rng = self._rng("picture", index)
        low, high = self.long_sides
        long = rng.between(low, rng.between(low, high))  # small ones more often
        aspect = 100 if rng.chance(40) else rng.between(100, self.max_aspect)
        short = max(MIN_SIDE, long * 100 // aspect)
        width, height = (long, short) if rng.chance(60) else (short, long)
        return replace(self.style, width=width, height=height)

    def scene_of_kind(self, index: int, kind: str, attempt: int = 0) -> DrawnScene:
        """Scene ``index`` of a kind.

        Args:
            index: Any whole number from 0.
            kind: A name of ``composition.KINDS``.
            attempt: Another scene in its place.
        Raises:
            DataError: The kind is unknown or the index negative.
        """
        if index < 0:
            raise DataError(f"world: scenes are numbered from 0, got {index}")
        scene = compose(self._rng("scene", kind, index, attempt), self._style(index), kind)
        return DrawnScene(**{field.name: getattr(scene, field.name) for field in fields(scene)})

    def _find(self, index: int, task: str) -> tuple[DrawnScene, list[Any]]:
        if task not in MAKERS:
            raise DataError(f"world: there are no scenes for task {task!r}{suggest(task, TASKS)}")
        rng = self._rng("kind", task, index)
        kind = rng.weighted(KINDS_OF_TASK[task])
        for attempt in range(MAX_ATTEMPTS):
            scene = self.scene_of_kind(index, kind, attempt)
            samples = self._samples(scene, task, index, attempt)
            if samples:
                for again in range(1, self.rounds):
                    samples = [*samples, *self._samples(scene, task, index, attempt, again)]
                return scene, samples
            if self.question_starts:  # not every kind of scene is asked them
                kind = rng.weighted(KINDS_OF_TASK[task])
        raise DataError(
            f"world {self.name}: no sample of task {task!r} in {MAX_ATTEMPTS} scenes; is the style too narrow?"
        )

    def _samples(self, scene: DrawnScene, task: str, *parts: object) -> list[Any]:
        samples = MAKERS[task](scene, self._rng("task", task, *parts))
        if not self.question_starts or task not in _QUESTION_TASKS:
            return samples
        return [sample for sample in samples if sample.question.startswith(self.question_starts)]

    def scene(self, index: int, task: str = "vqa") -> DrawnScene:
        """The scene that sample ``index`` of a task is about.

        Where two tasks take the same kind of scene for an index, it is nearly always the same scene.

        Args:
            index: Any whole number from 0.
            task: A name of ``KINDS_OF_TASK``; VQA's scenes are of every kind.
        Raises:
            DataError: The task has no scenes, or the index is negative.
        """
        return self._find(index, task)[0]

    def samples(self, index: int, task: str) -> list[Any]:
        """Every sample of a task that scene ``index`` of this task holds, in random order; at least one.

        Args:
            index: Any whole number from 0.
            task: A name of ``KINDS_OF_TASK``.
        Returns:
            Of the task's own sample class (``tasks.QuestionSample``, ...), in original pixels.
        Raises:
            DataError: As ``scene``.
        """
        return self._find(index, task)[1]

    def text(self, index: int) -> str:
        """Plain text ``index``, for training beside pictures.

        Raises:
            DataError: The index is negative.
        """
        if index < 0:
            raise DataError(f"world: texts are numbered from 0, got {index}")
        return (lookups if self.has_lookups else prose)(self._rng("text", index), self.style.split)

    def conversation(self, index: int, task: str, num_turns: int = 1) -> tuple[Scene, list[dict[str, str]]]:
        """A scene and a conversation about it.

        Args:
            index: Any whole number from 0.
            task: A name of ``KINDS_OF_TASK``; or "all": every turn is of another of the scene's tasks.
            num_turns: Questions at most; a scene may hold fewer samples.
        Returns:
            The scene and ``{"role", "content"}`` messages.
        Raises:
            DataError: As ``scene``; or ``num_turns`` is not positive.
        """
        if num_turns < 1:
            raise DataError(f"world: num_turns must be at least 1, got {num_turns}")
        if task == ALL_TASKS:
            return self._conversation_of_all_tasks(index, num_turns)
        scene, samples = self._find(index, task)
        rng = self._rng("wording", task, index)
        messages: list[dict[str, str]] = []
        for sample in samples[:num_turns]:
            has_choices = isinstance(sample, tasks.MultipleChoiceSample)
            if self.told_first_percent and has_choices and rng.chance(self.told_first_percent):
                plain = tasks.QuestionSample(sample.question, sample.choices[sample.answer])
                messages += self._turn("vqa", plain, rng)
            if self.choice_letters is not None and has_choices:
                sample = _cut(sample, self.choice_letters)
            if self.context_percent and has_choices and rng.chance(self.context_percent):
                sample = replace(sample, context=f"The answer is {sample.choices[sample.answer]}.")
            messages += self._turn(task, sample, rng)
        return scene, messages

    def _turn(self, task: str, sample: Any, rng: Rng) -> list[dict[str, str]]:
        if isinstance(sample, tasks.PoseSample) and self.point_grid is not None:
            sample = on_grid(sample, self.point_grid)
        asked = everyday(task, sample, rng) if self.everyday_percent and rng.chance(self.everyday_percent) else None
        if asked is not None:
            words, sample = asked
            formatter, wording = self._formatters.setdefault((task, words), _reworded(task, words)), 0
        else:
            formatter = self._formatters.setdefault(task, tasks.create(task))
            wording = rng.below(len(formatter.wordings)) if self.has_all_wordings else 0
        example = formatter.format(sample, wording)
        told = (example.instruction, example.answer)
        question, answer = told if self.point_grid is None else (move_to_grid(text, self.point_grid) for text in told)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _conversation_of_all_tasks(self, index: int, num_turns: int) -> tuple[Scene, list[dict[str, str]]]:
        rng = self._rng("all tasks", index)
        kind = rng.weighted(KIND_WEIGHTS)
        scene = self.scene_of_kind(index, kind)
        # a task that is about other kinds of scenes is not asked for here
        own = [task for task, kinds in KINDS_OF_TASK.items() if kind in dict(kinds)]
        left = {task: samples for task in own if (samples := MAKERS[task](scene, self._rng("task", task, index)))}
        messages: list[dict[str, str]] = []
        while left and len(messages) < 2 * num_turns:
            task = rng.weighted([(task, TASK_WEIGHTS[task]) for task in left])
            messages += self._turn(task, left[task].pop(), rng)
            left = {task: samples for task, samples in left.items() if samples}
        return scene, messages

    def record_id(self, index: int, task: str) -> str:
        """Names a record in reports."""
        return f"{self.name}-{task}-{index}"

    def image_path(self, index: int, task: str) -> str:
        """Where exports put a record's picture, relative to their folder."""
        return f"images/{self.record_id(index, task)}.png"

    def record(self, index: int, task: str, num_turns: int = 1) -> dict[str, Any]:
        """A record in the form of ``sphinxkit.data.conversations``, or ``{"id", "task", "text"}`` for plain text.

        Its ``image`` is a path that nothing is at, unless ``export_records`` has put it there.

        Args:
            index: Any whole number from 0.
            task: A name of ``TASKS``.
            num_turns: See ``conversation``.
        Raises:
            DataError: As ``conversation``.
        """
        name = self.record_id(index, task)
        if task == TEXT_TASK:
            return {"id": name, "task": task, "text": self.text(index)}
        _, messages = self.conversation(index, task, num_turns)
        return write_conversation(name, messages, image=self.image_path(index, task), task=task)
