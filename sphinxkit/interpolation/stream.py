"""A mix of models as a lazy source of tensors: nothing is computed before it is read, chunk by chunk."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

import torch
from torch import Tensor

from sphinxkit.errors import CheckpointError, DataError, list_errors
from sphinxkit.interpolation.content_hash import ContentHash, Hasher
from sphinxkit.interpolation.method import BLOCK, Combine, MixMethod, accumulation_dtype
from sphinxkit.interpolation.methods.linear import Linear
from sphinxkit.interpolation.outcomes import Decision, Missing, Outcome
from sphinxkit.interpolation.paging import will_need
from sphinxkit.interpolation.rules import ORDINALS, Rule, RuleBook
from sphinxkit.tensor_source import TensorSource

CHUNK = 8 * BLOCK  # elements that one job mixes (a million) and that are handed on at a time; a multiple of BLOCK
_AHEAD = 16 * CHUNK  # elements of each model that are asked of the disk before they are needed; our choice

_COPY = Linear()  # for the part of a tensor in which one model alone has a weight


class MixedSource:
    """The mix of several models, as a :class:`~sphinxkit.tensor_source.TensorSource`.

    Names, shapes and dtypes are settled and checked when it is made; data is read, mixed and checked for NaN and Inf
    when a tensor is asked for. Of one tensor at a time, only chunks of about a million elements exist in float32.

    Args:
        sources: The models, opened.
        method: For tensors without a rule of their own.
        weights: One per model, or None for the method's default.
        rules: Exceptions by name; the first match decides.
        base: The common ancestor, for the methods that need one.
        dtype: Dtype of all floating-point tensors of the result; None: the stored dtype of the model that a tensor is a
            copy of, else the dtype that holds those of the models that take part; "first": the first model's.
        names: Names of the models in messages.
        allow_nonfinite: Allow NaN and Inf.
        extrapolate: Allow weights outside [0, 1].
        hash_inputs: Hash every tensor that is read, for :meth:`input_hashes`: of all models, or of those with these
            indices (the base comes last).
        missing: "error"; "keep": a tensor that not every model holds is kept from the first that does; "first": one
            that only the first model holds is kept.
        num_threads: That mix chunks at the same time; default the number of processors, at most four.
    Raises:
        CheckpointError: Names or shapes differ without a rule for them; everything is listed.
        DataError: Weights or methods that cannot be used.
        RecipeError: A rule that matches nothing.
    """

    def __init__(
        self,
        sources: Sequence[TensorSource],
        method: MixMethod,
        weights: Sequence[float] | None = None,
        *,
        rules: Sequence[Rule] = (),
        base: TensorSource | None = None,
        dtype: torch.dtype | Literal["first"] | None = None,
        names: Sequence[str] | None = None,
        allow_nonfinite: bool = False,
        extrapolate: bool = False,
        hash_inputs: bool | Collection[int] = False,
        num_threads: int | None = None,
        missing: Missing = "error",
    ) -> None:
        if not sources:
            raise DataError("there are no models to mix")
        method.check_base(base is not None)
        self.weights = method.weights(weights, len(sources), extrapolate=extrapolate)
        self.names = list(names or ORDINALS[: len(sources)] or map(str, range(len(sources))))
        if len(self.names) < len(sources):
            self.names = [f"model {index + 1}" for index in range(len(sources))]
        book = RuleBook(rules)
        book.check(key for source in sources for key in source.keys())  # noqa: SIM118
        self._sources = [*sources, *([base] if base is not None else [])]
        self._has_base = base is not None
        decision = Decision(sources, base, self.names, method, self.weights, book, dtype, extrapolate, missing)
        self.outcomes = self._every = decision.outcomes()
        self._allow_nonfinite = allow_nonfinite
        self._hasher = Hasher(len(self._sources), hash_inputs) if hash_inputs else None
        self._num_threads = num_threads or min(4, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        self._finite: set[str] = set()

    def keys(self) -> Iterable[str]:
        """Names of the result's tensors, in the first model's order."""
        return self.outcomes.keys()

    def only(self, select: Callable[[str], bool]) -> MixedSource:
        """Some tensors of the same mix.

        Args:
            select: Whether a name is in.
        """
        part = copy.copy(self)
        part.outcomes = {key: outcome for key, outcome in self.outcomes.items() if select(key)}
        return part

    def _outcome(self, key: str) -> Outcome:
        if key not in self.outcomes:
            raise CheckpointError(f"the mix holds no tensor {key!r}")
        return self.outcomes[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of ``key``; CheckpointError if there is none."""
        return self._outcome(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of ``key`` in the result; CheckpointError if there is none."""
        return self._outcome(key).dtype

    def read(self, key: str) -> Tensor:
        """The whole mixed tensor; where it is a copy of one model's, possibly that model's mapped memory.

        Raises:
            CheckpointError: NaN or Inf in a source or in the result, or an unknown key.
        """
        outcome = self._outcome(key)
        if outcome.kind in ("keep", "equal"):
            for _ in self.chunks(key):  # checks
                pass
            whole = self._sources[outcome.model].read(key)
            return whole if whole.dtype == outcome.dtype else whole.to(outcome.dtype)
        whole = torch.empty(outcome.shape, dtype=outcome.dtype)
        self.read_into(key, whole)
        return whole

    def read_into(self, key: str, out: Tensor) -> None:
        """Write the mixed tensor into ``out``, whatever its dtype and device, without a whole copy in between.

        Args:
            key: Name.
            out: Overwritten in place.
        Shape:
            out: ``shape(key)``
        Raises:
            CheckpointError: As :meth:`read`, or ``out`` has another shape.
        """
        outcome = self._outcome(key)
        if tuple(out.shape) != outcome.shape:
            raise CheckpointError(f"{key}: the mix is {list(outcome.shape)}, asked for {list(out.shape)}")
        if not out.is_contiguous():
            out.copy_(self.read(key))
            return
        flat, position = out.detach().view(-1), 0
        for chunk in self.chunks(key):
            flat[position : position + chunk.numel()].copy_(chunk)
            position += chunk.numel()

    def chunks(self, key: str) -> Iterator[Tensor]:
        """The mixed tensor in row-major order, as flat contiguous pieces of about a million elements.

        Pieces must not be written to: they may be mapped memory of a source. Later pieces are read and mixed in other
        threads while the caller works on one.

        Raises:
            CheckpointError: As :meth:`read`.
        """
        outcome = self._outcome(key)
        parts = {index: self._sources[index].read(key) for index in self._participants(outcome)}
        if self._hasher:
            self._hasher.start(key, parts)
        flat = {index: part.reshape(-1) for index, part in parts.items()}
        del parts
        own = outcome.model % len(self._sources)
        if outcome.kind == "mix":
            yield from self._mixed(key, outcome, flat)
        elif outcome.kind == "overlap":
            yield from self._mixed(key, outcome, {index: part[: outcome.common] for index, part in flat.items()})
            yield from self._kept(key, outcome, flat[own][outcome.common :])
        else:
            if outcome.kind == "equal":
                self._check_equal(key, flat)
            yield from self._kept(key, outcome, flat[own])
        if self._hasher:
            self._hasher.wait()  # it holds the tensors, which are not all mapped: let go before the next are read
        self._finite.add(key)

    def input_hashes(self) -> list[ContentHash]:
        """Content hash of every model (the base last) over the tensors read so far; empty unless ``hash_inputs``."""
        return self._hasher.results() if self._hasher else []

    def _participants(self, outcome: Outcome) -> list[int]:
        base = len(self._sources) - 1
        if outcome.kind == "keep":
            return [outcome.model % len(self._sources)]
        if outcome.kind == "equal":
            return list(range(base if self._has_base else base + 1))
        used = self._order(outcome)
        rest = [outcome.model % len(self._sources)] if outcome.kind == "overlap" else []
        return list(dict.fromkeys([*used, *rest]))

    def _order(self, outcome: Outcome) -> list[int]:
        """The models whose data takes part in mixing, as the kernel wants them: base first, or weight 0 left out."""
        if outcome.method is not None and outcome.method.needs_base:
            return [len(self._sources) - 1, *range(len(self._sources) - 1)]
        return [index for index, weight in enumerate(outcome.weights) if weight != 0]

    def _mixed(self, key: str, outcome: Outcome, flat: Mapping[int, Tensor]) -> Iterator[Tensor]:
        method = outcome.method or _COPY
        order = self._order(outcome)
        weights = outcome.weights if method.needs_base else [weight for weight in outcome.weights if weight != 0]
        if len(weights) < 2 and not method.needs_base:  # one model's rows, or the only model
            method = _COPY
        parts = [flat[index] for index in order]
        work = accumulation_dtype([part.dtype for part in parts])
        numel = parts[0].numel()

        def passes() -> Iterator[tuple[int, list[Tensor]]]:
            for start in range(0, numel, BLOCK):
                yield start, [part[start : start + BLOCK].to(work, copy=True) for part in parts]

        combine = method.prepare(passes, weights, key)
        limit = None if self._allow_nonfinite else torch.finfo(outcome.dtype).max
        jobs = (
            _Job(parts, start, min(start + CHUNK, numel), combine, work, outcome.dtype, limit, method.needs_base)
            for start in range(0, numel, CHUNK)
        )
        for result in self._run(jobs, numel, parts):
            if result is None:
                self._raise_nonfinite(key)
            else:
                yield result

    def _run(self, jobs: Iterator[_Job], numel: int, parts: Sequence[Tensor]) -> Iterator[Tensor | None]:
        if numel <= CHUNK or self._num_threads == 1:
            for job in jobs:
                yield job()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="sphinxkit-mix")
        pending: deque[Future[Tensor | None]] = deque()
        asked = 0
        try:
            for job in jobs:
                if asked < min(job.start + _AHEAD // 2, numel):
                    for part in parts:
                        will_need(part[asked : job.start + _AHEAD])
                    asked = job.start + _AHEAD
                pending.append(self._pool.submit(job))
                if len(pending) > self._num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            for future in pending:
                with contextlib.suppress(Exception):
                    future.exception() if not future.cancelled() else None

    def _kept(self, key: str, outcome: Outcome, flat: Tensor) -> Iterator[Tensor]:
        check = flat.dtype.is_floating_point and not self._allow_nonfinite
        limit = torch.finfo(outcome.dtype).max if check else 0.0
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK]
            if check and not within(piece, limit):
                self._raise_nonfinite(key)
            yield piece if piece.dtype == outcome.dtype else piece.to(outcome.dtype)

    def _check_equal(self, key: str, flat: Mapping[int, Tensor]) -> None:
        first = next(iter(flat))
        for index, part in flat.items():
            if not torch.equal(part, flat[first]):
                raise CheckpointError(
                    f"{key}: stored as {part.dtype}, which is not mixed, and {self.names[first]} and "
                    f"{self.names[index]} differ; say which to keep in a rule: '{key}: keep first'"
                )

    def _raise_nonfinite(self, first: str) -> None:
        """Look through everything not yet found finite and raise one error that names what is not."""
        errors = []
        for key in [first, *(key for key in self._every if key not in self._finite and key != first)]:
            outcome = self._every[key]
            bad = False
            for index in self._participants(outcome):
                nans, infs = count_nonfinite(self._sources[index].read(key))
                if nans or infs:
                    bad = True
                    errors.append(f"{key} in {self._name(index)}: {nans} NaN, {infs} Inf")
            if key == first and not bad:
                errors.append(f"{key}: finite in every model, but the result does not fit {outcome.dtype}")
        raise CheckpointError(
            list_errors("not every number is finite", errors) + "\npass allow_nonfinite=True to go on"
        )

    def _name(self, index: int) -> str:
        return self.names[index] if index < len(self.names) and not self._is_base(index) else "base"

    def _is_base(self, index: int) -> bool:
        return self._has_base and index == len(self._sources) - 1


class _Job:
    """One chunk to mix: called in a thread, gives the chunk in the result's dtype, or None if it is not finite."""

    def __init__(
        self,
        parts: Sequence[Tensor],
        start: int,
        stop: int,
        combine: Combine,
        work: torch.dtype,
        dtype: torch.dtype,
        limit: float | None,
        check_parts: bool,
    ) -> None:
        self.start = start
        self._parts = [part[start:stop] for part in parts]
        self._combine = combine
        self._work = work
        self._dtype = dtype
        self._limit = limit
        self._check_parts = check_parts and limit is not None  # methods that drop elements would hide what is in them

    def __call__(self) -> Tensor | None:
        size = self._parts[0].numel()
        out = torch.empty(size, dtype=self._dtype)
        for begin in range(0, size, BLOCK):
            block = [part[begin : begin + BLOCK].to(self._work, copy=True) for part in self._parts]
            if self._check_parts and not all(within(part, torch.finfo(self._work).max) for part in block):
                return None
            result = self._combine(self.start + begin, block)
            if self._limit is not None and not within(result, self._limit):
                return None
            out[begin : begin + BLOCK] = result
        return out


def within(tensor: Tensor, limit: float) -> bool:
    """Whether every element is finite and of magnitude at most ``limit``.

    Shape:
        tensor: any
    """
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())  # both are NaN if any element is
    return -limit <= low.item() and high.item() <= limit


def count_nonfinite(tensor: Tensor) -> tuple[int, int]:
    """How many NaN and how many Inf a tensor holds, looked at chunk by chunk.

    Shape:
        tensor: any
    """
    nans = infs = 0
    flat = tensor.reshape(-1)
    if not flat.dtype.is_floating_point:
        return 0, 0
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].float()
        nans += int(piece.isnan().sum())
        infs += int(piece.isinf().sum())
    return nans, infs


class InPlaceSource(TensorSource, Protocol):
    """A source that can write a tensor into a given buffer, such as a checkpoint or a mix."""

    def read_into(self, key: str, out: Tensor) -> None:
        """Write the tensor ``key`` into ``out``, whatever its dtype and device.

        Shape:
            out: as the tensor
        """
        ...


def update_in_place(tensors: Mapping[str, Tensor], source: InPlaceSource) -> None:
    """Overwrite a model's tensors with a mix, one after the other, without a second copy of the model.

    Args:
        tensors: By the source's names, for example a module's ``state_dict()``; any dtype and device.
        source: The mix.
    Shape:
        tensors: each as ``source.shape`` of its name
    Raises:
        CheckpointError: The names are not the same.
    """
    names = set(source.keys())
    if names != set(tensors):
        odd = sorted(names ^ set(tensors))
        raise CheckpointError(list_errors("the mix and the model in memory do not hold the same tensors", odd))
    with torch.no_grad():
        for key, tensor in tensors.items():
            source.read_into(key, tensor)
