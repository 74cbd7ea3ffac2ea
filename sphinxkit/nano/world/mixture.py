"""Worlds as sources of a mixture: samples are generated on demand, not read from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sphinxkit.data.conversations import OverLength
from sphinxkit.data.mixture import Mixture, MixtureSource, Remainder
from sphinxkit.data.permutation import derive_key
from sphinxkit.data.samples import Sample, SampleType
from sphinxkit.errors import DataError
from sphinxkit.nano.world.render import render
from sphinxkit.nano.world.scene import Domain, Scene
from sphinxkit.nano.world.world import ALL_TASKS, TASKS, TEXT_TASK, World
from sphinxkit.registry import suggest

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_SCENES = 1 << 32  # of one source; an epoch draws from them without drawing one twice
EPOCH_SIZE = 100_000


@dataclass(frozen=True, slots=True)
class WorldSample(Sample):
    """A sample whose picture is drawn when it is opened; its ``image`` is a path that nothing is at.

    Args:
        scene: What the picture is of; None without one.
    """

    scene: Scene | None = None

    def open_image(self) -> Image:
        """The picture, in RGB.

        Raises:
            DataError: There is none.
        """
        from PIL import Image

        if self.scene is None:
            raise DataError(f"sample {self.id}: it has no image")
        return Image.fromarray(render(self.scene))


@dataclass(frozen=True, slots=True)
class WorldSource:
    """One task's samples in one domain.

    Args:
        task: A name of ``world.TASKS``; "text" is plain text, "all" asks about a scene in all of its tasks.
        weight: Its share of an epoch relative to the others' weights.
        domain: ``real`` or ``synthetic``.
        num_turns: Questions about a scene, at most.
        name: For reports; unique. None: domain and task.
        num_scenes: Number of scenes; a longer epoch repeats some.
        has_image: False: conversations without the picture.
        options: Options of ``World``; they replace those of the mixture.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    task: str
    weight: float = 1.0
    domain: Domain = "synthetic"
    num_turns: int = 1
    name: str | None = None
    num_scenes: int = NUM_SCENES
    has_image: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Part:
    """A source with the world that it is drawn from."""

    spec: MixtureSource
    name: str
    world: World
    source: WorldSource
    count: int = 0

    def __len__(self) -> int:
        return self.source.num_scenes

    def sample_id(self, index: int) -> str:
        return f"{self.name}:{index}"

    def read(self, index: int, sample_id: str) -> Sample:
        where, task = f"{self.world.name}:{index}", self.source.task
        if task == TEXT_TASK:
            return WorldSample(sample_id, task, (), self.world.text(index), None, where)
        scene, messages = self.world.conversation(index, task, self.source.num_turns)
        if not self.source.has_image:
            return WorldSample(sample_id, task, tuple(messages), "", None, where)
        image = Path(self.world.image_path(index, task))
        return WorldSample(sample_id, task, tuple(messages), "", image, where, scene)


class WorldMixture(Mixture):
    """A mixture of worlds' tasks: batches of one type, any order and resuming as ``Mixture`` has them.

    In a training recipe: ``mixture: {type: "sphinxkit.nano.world:WorldMixture", sources: [...], ...}``.

    Args:
        sources: ``WorldSource``, its fields as mappings, or tasks' names.
        batch_size: Samples in a batch over all ranks.
        seed: Seed of the order and of the scenes.
        epoch_size: Samples in an epoch; every epoch draws other scenes.
        split: ``train``, ``val`` or ``test``.
        size: Size of the pictures: a square's side, or (width, height).
        options: Further options of ``World``.
        remainder: See ``Mixture``.
        over_length: See ``Mixture``.
        max_bad_rate: See ``Mixture``.
    Raises:
        DataError: There are no sources, one of them is not possible, or a name is there twice.
    """

    def __init__(
        self,
        sources: Sequence[WorldSource | Mapping[str, Any] | str],
        batch_size: int = 1,
        seed: int = 0,
        epoch_size: int = EPOCH_SIZE,
        split: str = "train",
        size: int | Sequence[int] = 112,
        options: Mapping[str, Any] | None = None,
        remainder: Remainder = "drop",
        over_length: OverLength = "error",
        max_bad_rate: float = 0.01,
    ) -> None:
        if not sources or batch_size < 1 or epoch_size < 1:
            raise DataError(
                f"world mixture: expected sources, and batch_size and epoch_size of at least 1, got {len(sources)} "
                f"sources, batch_size {batch_size}, epoch_size {epoch_size}"
            )
        self.batch_size, self.seed, self.remainder, self.locality = batch_size, seed, remainder, None
        self.over_length, self.max_bad_rate, self.temperature = over_length, max_bad_rate, None
        shared = {"split": split, "size": size, "seed": seed, **(options or {})}
        self._parts = [_open(index, source, shared) for index, source in enumerate(sources)]
        taken = [part.name for part in self._parts]
        repeated = sorted({name for name in taken if taken.count(name) > 1})
        weights = [part.source.weight for part in self._parts]
        if repeated or min(weights) < 0 or not sum(weights):
            raise DataError(
                f"world mixture: names must be unique and weights positive; repeated: {repeated}, weights: {weights}"
            )
        self._sources = self._parts
        self._share_out(weights, epoch_size)
        self._groups = self._make_groups()

    def fingerprint(self) -> str:
        """Changes whenever the samples or their order could."""
        styles = [
            (part.name, repr(part.world.style), part.world.seed, part.source.num_turns, *_telling(part.world))
            for part in self._parts
        ]
        return f"{derive_key(Mixture.fingerprint(self), styles):016x}"


def _telling(world: World) -> list[object]:
    """What a world's conversations do differently, as far as its style does not say it."""
    found: list[object] = ["all wordings"] if world.has_all_wordings else []
    if world.point_grid is not None:
        found.append(("point grid", world.point_grid))
    if world.long_sides is not None:
        found.append(("long sides", *world.long_sides, world.max_aspect))
    if world.everyday_percent:
        found.append(("everyday", world.everyday_percent))
    if world.rounds > 1 or world.told_first_percent:
        found.append(("rounds", world.rounds, "told first", world.told_first_percent))
    if world.context_percent or world.question_starts:
        found.append(("context", world.context_percent, "starts", *world.question_starts))
    if world.has_lookups:
        found.append("lookups")
    if world.choice_letters is not None:
        found.append(("choice letters", world.choice_letters))
    if world.wordings:
        found.append(tuple(sorted(world.wordings.items())))
    return found


def _open(index: int, given: WorldSource | Mapping[str, Any] | str, shared: Mapping[str, Any]) -> _Part:
    try:
        source = (
            given
            if isinstance(given, WorldSource)
            else WorldSource(**({"task": given} if isinstance(given, str) else given))
        )
        options = {"domain": source.domain, **shared, **source.options}
        if not isinstance(options["size"], int):
            options["size"] = tuple(options["size"])
        world = World(**options)
    except TypeError as error:
        raise DataError(f"world mixture: sources[{index}]: {error}") from error
    if source.task not in (*TASKS, ALL_TASKS):
        raise DataError(f"world mixture: sources[{index}]: unknown task {source.task!r}{suggest(source.task, TASKS)}")
    name = source.name or f"{source.domain}-{source.task}"
    kind: SampleType = "text" if source.task == TEXT_TASK or not source.has_image else "image-text"
    spec = MixtureSource(path="", name=name, task=source.task, type=kind)
    return _Part(spec, name, world, source)
