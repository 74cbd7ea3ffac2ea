"""Base class and registry of merge methods, and shared helpers.

A method is written for flat chunks, so that one implementation serves whole tensors and streams: ``prepare`` makes a
``Combine`` for one tensor, from as many passes over its chunks as its statistics need, and that mixes one chunk. Chunks
are flat, in the accumulation dtype, and belong to the method, which may overwrite them.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.registry import Registry

Combine = Callable[[int, Sequence[Tensor]], Tensor]  # (offset of the chunk in elements, one chunk per model) -> result
Passes = Callable[[], Iterator[tuple[int, list[Tensor]]]]  # starts a new pass over all chunks of one tensor

BLOCK = 2**17  # elements per chunk that methods see: 0.5 MB in float32, a few of them stay in a core's L2 (our choice)
SUM_TOLERANCE = 1e-6  # how far weights may be from 1 in total and still count as an average: decimal fractions as typed


class MixMethod(ABC):
    """Base class of merge methods. A subclass's fields are its options.

    Attributes:
        name: Registered name.
        needs_base: Whether a common ancestor takes part; its chunk then comes first.
        averages: Whether weights must sum to 1 and lie in [0, 1] unless extrapolation is asked for.
        max_models: Largest number of models, None for any.
        takes_weights: Whether weights can be chosen; where not, the default ones define the method.
    """

    name: ClassVar[str] = ""
    needs_base: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    max_models: ClassVar[int | None] = None
    takes_weights: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, passes: Passes, weights: Sequence[float], name: str | None = None) -> Combine:
        """What mixes the chunks of one tensor.

        Args:
            passes: Starts a pass over the chunks: one per model, after the base's if there is a base.
            weights: One per model.
            name: Of the tensor; None for a tensor without a name.
        """

    def default_weights(self, num_models: int) -> tuple[float, ...] | None:
        """The weights where none are given; None if they must be given."""
        return None

    def copy_of(self, weights: Sequence[float]) -> int | None:
        """Index of the model that the result is bit for bit (-1: the base), or None."""
        if self.needs_base and not any(weights):
            return -1
        used = [index for index, weight in enumerate(weights) if weight != 0]
        return used[0] if len(used) == 1 and weights[used[0]] == 1 else None

    def check_base(self, has_base: bool) -> None:
        """Raise if the method needs a base and there is none.

        Raises:
            DataError: The method needs a base and none is given.
        """
        if self.needs_base and not has_base:
            raise DataError(f"{self.name} adds differences to a base model (a common ancestor); name it: base=MODEL")

    def weights(
        self, given: Sequence[float] | None, num_models: int, *, extrapolate: bool = False, normalize: bool = False
    ) -> tuple[float, ...]:
        """The weights to use, checked.

        Args:
            given: One per model, or None for the default.
            num_models: How many models are mixed, the base not counted.
            extrapolate: Allow weights outside [0, 1] and, for averages, any sum.
            normalize: Divide by the sum first.
        Raises:
            DataError: Weights are missing, too many or too few, not finite, outside [0, 1] or do not sum to 1, or the
                method sets others itself.
        """
        if self.max_models is not None and num_models > self.max_models:
            raise DataError(f"{self.name} takes at most {self.max_models} models, got {num_models}")
        default = self.default_weights(num_models)
        if given is None:
            if default is None:
                raise DataError(f"{self.name} needs a beta (for two models) or weights")
            return default
        weights = check_weights(given, num_models)
        if not self.takes_weights and weights != default:
            raise DataError(
                f"{self.name} sets its weights itself: {list(default or ())}, so beta or weights {list(weights)} "
                "cannot be given; linear takes them"
            )
        if normalize:
            weights = normalized(weights)
        if not self.needs_base and not any(weights):
            raise DataError(f"{self.name}: every weight is 0")
        if not self.averages or extrapolate:
            return weights
        if any(not 0 <= weight <= 1 for weight in weights):
            raise DataError(f"weights {list(weights)} (beta) lie outside [0, 1]; pass extrapolate=True to allow it")
        if abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
            total = math.fsum(weights)
            raise DataError(f"weights {list(weights)} sum to {total:g}, not 1; pass normalize=True or extrapolate=True")
        return weights

    def apply(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        *,
        base: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Mix whole tensors.

        Accumulates in float32 (float64 if an input is float64) and leaves the inputs alone. Where the result is one of
        the inputs by definition (one weight of 1 and the others 0), it is that input bit for bit.

        Args:
            tensors: One per model.
            weights: One per model; any finite numbers.
            base: The common ancestor, for methods that need one.
            dtype: Of the result; None: the dtype that holds those of all inputs.
        Shape:
            tensors, base, return: all the same, any
        Raises:
            ShapeError: No tensors, or different shapes.
            DataError: Not one finite weight per tensor, tensors that are not floating point, or no base.
        """
        weights = check_weights(weights, len(tensors))
        self.check_base(base is not None)
        inputs = list(tensors) if base is None else [base, *tensors]
        if not inputs:
            raise ShapeError("there are no tensors to mix")
        shapes = [tuple(tensor.shape) for tensor in inputs]
        if len(set(shapes)) > 1:
            raise ShapeError(f"tensors to mix must have one shape, got {', '.join(map(str, shapes))}")
        dtypes = [tensor.dtype for tensor in inputs]
        dtype = dtype or common_dtype(dtypes)
        copied = self.copy_of(weights)
        if copied is not None:
            return inputs[copied + (base is not None)].detach().to(dtype, copy=True)
        if not all(one.is_floating_point for one in dtypes):
            raise DataError(f"only floating point tensors can be mixed, got {', '.join(map(str, dtypes))}")
        work = accumulation_dtype(dtypes)

        def parts() -> list[Tensor]:
            return [tensor.detach().reshape(-1).to(work, copy=True) for tensor in inputs]

        combine = self.prepare(lambda: iter([(0, parts())]), weights)
        return combine(0, parts()).to(dtype).reshape(shapes[0])


M = TypeVar("M", bound=type[MixMethod])

registry: Registry[MixMethod] = Registry("mixing method")


def register(name: str) -> Callable[[M], M]:
    """Decorator that registers a method under ``name``, which messages then call it, too.

    Raises:
        RegistryError: The name is taken.
    """

    def decorator(method: M) -> M:
        method.name = name
        return registry.register(name)(method)

    return decorator


def build_method(method: str | Mapping[str, Any]) -> MixMethod:
    """Build the method of a recipe: a registered name, or ``{type: name, option: value, ...}``.

    Raises:
        RegistryError: Unknown name or option.
        DataError: An option's value is not possible.
    """
    if isinstance(method, str):
        return registry.build(method)
    return registry.build(method["type"], **{str(key): value for key, value in method.items() if key != "type"})


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds every one of ``dtypes`` (float16 with bfloat16 gives float32)."""
    return functools.reduce(torch.promote_types, dtypes)


def accumulation_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """float64 if an input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights as floats.

    Raises:
        DataError: Not one weight per tensor, or a weight is NaN or infinite.
    """
    if len(weights) != count:
        raise DataError(f"{len(weights)} weights were given for {count} tensors")
    if not all(math.isfinite(weight) for weight in weights):
        raise DataError(f"weights must be finite, got {list(weights)}")
    return tuple(float(weight) for weight in weights)


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum.

    Raises:
        DataError: They sum to 0.
    """
    total = math.fsum(weights)
    if total == 0:
        raise DataError(f"weights {list(weights)} sum to 0 and cannot be normalised")
    return tuple(weight / total for weight in weights)


def check_fraction(name: str, value: float, *, low_open: bool = False, high_open: bool = False) -> None:
    """Raise unless ``value`` lies in [0, 1], without an end point that is open.

    Raises:
        DataError: The message names the value and the interval.
    """
    is_inside = isinstance(value, (int, float)) and 0 <= value <= 1
    if not is_inside or (low_open and value == 0) or (high_open and value == 1):
        interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
        raise DataError(f"{name} must be in {interval}, got {value!r}")


def check_number(name: str, value: float, *, whole: bool = False) -> None:
    """Raise unless ``value`` is a finite number, or a whole one.

    Raises:
        DataError: The message names the value.
    """
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or not math.isfinite(value):
        raise DataError(f"{name} must be a {'whole' if whole else 'finite'} number, got {value!r}")
