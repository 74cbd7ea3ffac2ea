"""Data streams: packed or padded batches of every step, and each stream's position."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.data.collate import Batch, Example, ExampleMaker, collate_packed, collate_padded
from sphinxkit.data.loading import BadSample, MixtureBatch, MixtureLoader
from sphinxkit.data.mixture import Mixture
from sphinxkit.data.packing import pack
from sphinxkit.errors import DataError, RecipeError
from sphinxkit.recipe import Recipe
from sphinxkit.recipe.schema import mixtures
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.data_files import changed_files, content_digests
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.plan import StreamPlan, TrainPlan


def open_mixture(stream: StreamPlan, data_root: str = "", folder: Path | None = None) -> Mixture:
    """The mixture of a stream, with the stream's batch size.

    Args:
        stream: Names the mixture.
        data_root: Folder that the mixture's paths are relative to; "": the working folder.
        folder: Base folder of the mixture recipe's path.
    Raises:
        RecipeError: It is not a valid mixture recipe.
        DataError: Its files cannot be read.
    """
    if isinstance(stream.mixture, str):
        below = None if folder is None else folder / stream.mixture
        recipe = Recipe.find(below if below is not None and below.exists() else stream.mixture)
        options = dict(recipe.of_kind("mixture").document)
    elif "type" in stream.mixture:
        options = {key: value for key, value in stream.mixture.items() if key != "type"}
        found: Mixture = mixtures().build(str(stream.mixture["type"]), **options | {"batch_size": stream.batch_size})
        return found
    else:
        options = dict(Recipe({"kind": "mixture", **stream.mixture}).document)
    del options["kind"]
    place = Path(data_root) / str(options.get("folder", ""))
    return Mixture(**options | {"batch_size": stream.batch_size, "folder": str(place)})


@dataclass(frozen=True, slots=True)
class StepData:
    """One process's data of a step.

    Args:
        batches: Batches of every stream.
        ids: Ids of the samples, by stream.
        lengths: Positions of each sample by stream, image tokens included.
        bad: Samples that could not be used.
        skipped: Samples skipped because of their length.
        truncated: Ids of the samples that were cut to fit.
    """

    batches: dict[str, list[Batch]]
    ids: dict[str, list[str]]
    lengths: dict[str, list[int]]
    bad: list[BadSample] = field(default_factory=list)
    skipped: list[BadSample] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)


class Streams:
    """All streams of a run, read in step.

    Args:
        plan: Lists the streams and the packing.
        model: Provides tokenizer, template and image size.
        num_image_tokens: Tokens of one image.
        dims: Process layout.
        folder: Base folder of relative paths.
    Raises:
        RecipeError: A mixture is not valid.
        DataError: A mixture cannot be read.
    """

    def __init__(
        self, plan: TrainPlan, model: SphinxModel, num_image_tokens: int, dims: ParallelDims, folder: Path | None = None
    ) -> None:
        if model.tokenizer is None or model.conversation is None:
            raise RecipeError("training needs a model with a tokenizer and a conversation template")
        self.plan = plan
        self.num_image_tokens = num_image_tokens
        self.max_tokens = min(plan.max_tokens or model.llm.max_seq_len, model.llm.max_seq_len)
        self.pad_id = max(model.tokenizer.pad_id, 0)
        self.mixtures = {name: open_mixture(stream, plan.data_root, folder) for name, stream in plan.data.items()}
        self.loaders = {
            name: MixtureLoader(
                mixture,
                ExampleMaker(
                    template=model.conversation,
                    tokenizer=model.tokenizer,
                    image_size=0 if model.vision is None else model.vision.image_size,
                    max_tokens=self.max_tokens,
                    num_image_tokens=self.num_image_tokens,
                    over_length=mixture.over_length,
                ),
                rank=dims.dp_rank,
                world_size=dims.dp_size,
                num_workers=plan.num_workers,
            )
            for name, mixture in self.mixtures.items()
        }
        self._files = {name: list(getattr(mixture, "files", ())) for name, mixture in self.mixtures.items()}
        self._digests = self._read_digests(dims)
        self._iterators: dict[str, Generator[MixtureBatch, None, None]] = {}

    def _read_digests(self, dims: ParallelDims) -> dict[str, list[str]]:
        """The first process reads the files for all."""
        digests: dict[str, list[str]] = {}
        with dims.shared_errors():
            if dims.is_main:
                digests = {name: content_digests(paths) for name, paths in self._files.items()}
        found_by_first: dict[str, list[str]] = dims.gather(digests)[0]
        return found_by_first

    @property
    def num_steps(self) -> int:
        """Number of steps of the run: the plan's, or that of the first stream's epochs.

        Raises:
            TrainingError: The epochs are too short for one step.
        """
        if self.plan.steps is not None:
            return self.plan.steps
        first = next(iter(self.mixtures.values()))
        steps = int(first.num_batches * self.plan.epochs)
        if steps < 1:
            raise TrainingError(f"{self.plan.epochs} epochs of {first.num_batches} batches hold no step")
        return steps

    def read(self) -> StepData:
        """The next step's data.

        Raises:
            DataError: Too many samples are bad.
            TrainingError: A worker process died.
        """
        found: dict[str, MixtureBatch] = {}
        for name, loader in self.loaders.items():
            if name not in self._iterators:
                self._iterators[name] = iter(loader)
            try:
                found[name] = next(self._iterators[name])
            except RuntimeError as error:
                if isinstance(error, DataError | TrainingError) or "DataLoader worker" not in str(error):
                    raise
                raise TrainingError(
                    f"data.{name}: a worker process died ({str(error).splitlines()[0]}); out of memory, or a file "
                    "system that hangs? num_workers: 0 reads in the training process and shows the error"
                ) from error
        return StepData(
            batches={name: self.batches(batch.samples) for name, batch in found.items()},
            ids={name: list(batch.ids) for name, batch in found.items()},
            lengths={n: [each.length(self.num_image_tokens) for each in batch.samples] for n, batch in found.items()},
            bad=[bad for batch in found.values() for bad in batch.bad],
            skipped=[skipped for batch in found.values() for skipped in batch.skipped],
            truncated=[name for batch in found.values() for name in batch.truncated],
        )

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """Examples of one stream as batches: packed rows or padded rectangles."""
        if not examples:
            return []
        if not self.plan.packing:
            size = self.plan.micro_batch_size
            starts = range(0, len(examples), size)
            return [collate_padded(examples[start : start + size], self.pad_id) for start in starts]
        lengths = [example.length(self.num_image_tokens) for example in examples]
        rows = pack(lengths, max(self.plan.pack_tokens, *lengths))
        return [collate_packed([examples[index] for index in row]) for row in rows]

    def close(self) -> None:
        """Stop the reader processes; ``read`` starts them again at each stream's position."""
        for iterator in self._iterators.values():
            iterator.close()
        self._iterators.clear()

    def state(self) -> dict[str, Any]:
        """Position of every stream, valid for any number of processes."""
        return {name: {**loader.state_dict(), "files": self._digests[name]} for name, loader in self.loaders.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state.

        Raises:
            TrainingError: A stream's data differ from those of the state.
        """
        self.close()
        for name, loader in self.loaders.items():
            changed = changed_files(self._files[name], state[name].get("files", ()), self._digests[name])
            if changed:
                names = ", ".join(map(str, changed))
                raise TrainingError(
                    f"data.{name} cannot go on where the run stopped: the content of {names} has changed since. Put "
                    "the old files back, or start another run from this one's model (init_from)"
                )
            try:
                loader.load_state_dict(dict(state[name]))
            except DataError as error:
                raise TrainingError(f"data.{name} cannot go on where the run stopped: {error}") from error
