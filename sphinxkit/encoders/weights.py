"""Loads published weights of any public format into an encoder, tensor by tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinxkit.encoders.base import Encoder, registry
from sphinxkit.encoders.formats.base import FoundTensor, Translation, WeightFormat
from sphinxkit.encoders.positions import grid_side
from sphinxkit.encoders.weight_files import open_files
from sphinxkit.errors import CheckpointError, ShapeError, raise_errors

PRETRAINED = "pretrained"
"""The source that stands for an encoder's own published weights, ``encoder.info.weights``."""

_MAX_NAMED = 6  # tensor names in a message; our choice
_MAX_FIRST = 8  # errors of a kind that come before those of other kinds; our choice
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedWeights:
    """Description of loaded weights, for logs and reports.

    Args:
        source: The file, folder or repository.
        format: The format that was found.
        files: The files that were opened.
        num_bytes: Stored bytes of the tensors that are read.
        skipped: Names of tensors that SPHINX does not use: text towers, heads.
        activation: Activation of the feed-forward layers.
        resampled: Descriptions of resampled position tables.
    """

    source: str
    format: str
    files: tuple[Path, ...]
    num_bytes: int
    skipped: tuple[str, ...]
    activation: str
    resampled: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(path.name for path in self.files)
        parts = [f"{self.format} weights from {self.source} ({names}), {self.num_bytes / 2**20:,.1f} MiB read"]
        if self.activation:
            parts.append(f"activation {self.activation}")
        if self.resampled:
            parts.append(f"positions resampled: {', '.join(self.resampled)}")
        if self.skipped:
            parts.append(f"{len(self.skipped)} tensors that are not used skipped ({self.skipped[0]}, ...)")
        return "; ".join(parts)


def create(name: str, *, weights: str | Path | None = None, **options: Any) -> Encoder:
    """Build the encoder ``name``, with random weights or with published ones.

    Args:
        name: A registered name, or ``package.module:builder``.
        weights: None leaves the random weights; else a source as :func:`load_weights` takes it: ``"pretrained"``, a
            file or folder, or ``hf://org/repo[@revision][/file]``. Only a hub source touches the network.
        **options: Options of the builder.
    Raises:
        RegistryError: Unknown name or option.
        ShapeError: Options that do not fit each other.
        CheckpointError: As :func:`load_weights`.
    """
    encoder = registry.build(name, **options)
    if weights is not None:
        load_weights(encoder, weights, options.get("activation"))
    return encoder


def published_source(encoder: Encoder) -> str:
    """Source of an encoder's own published weights.

    Raises:
        CheckpointError: None are known for its sizes.
    """
    if not encoder.info.weights:
        raise CheckpointError(
            f"encoder {encoder.name}: no published weights are known for it with these options; give a file, a folder "
            "or hf://org/repo"
        )
    return encoder.info.weights


@dataclass(frozen=True)
class PublishedWeights:
    """Published weights under an encoder's own names, read one at a time; a ``TensorSource``.

    Made by :func:`open_weights`, which has checked that every tensor is there and fits.

    Args:
        report: What was found.
        tensors: By the encoder's names.
        fit: Makes a tensor of the encoder's shape.
        shapes: Of the encoder's tensors.
    """

    report: LoadedWeights
    tensors: Mapping[str, FoundTensor]
    fit: Callable[[str], Tensor]
    shapes: Mapping[str, tuple[int, ...]]

    def keys(self) -> Iterable[str]:
        """The encoder's names, in its order."""
        return self.shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, as the encoder has it."""
        return self.shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor."""
        return self.tensors[key].parts[0].dtype

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored dtype, in the encoder's shape; do not write to it."""
        return self.fit(key)


def load_weights(encoder: Encoder, source: str | Path, activation: str | None = None) -> LoadedWeights:
    """Load published weights of any known format into an encoder; logs and returns what was found.

    The format is detected from tensor names. Tensors stream one by one from mapped files into the encoder's own
    parameters, keeping its dtype and device; pickles are read with ``weights_only``. Text towers and heads are skipped
    by name. A position table of another size is resampled by the family's own rule. The activation is set from the
    files if they state it (OpenAI's are QuickGELU).

    Args:
        encoder: With parameters that are not on the meta device.
        source: ``"pretrained"`` for ``encoder.info.weights``, a file, a folder, or ``hf://org/repo[@revision][/path]``.
        activation: Activation of the weights, if the files do not state it; None: the format's usual one, with a
            warning.
    Raises:
        CheckpointError: The source cannot be read, is of no known format, or does not fit; one error lists every tensor
            that is missing, unexpected or of another shape. The encoder is then unchanged.
    """
    if any(parameter.is_meta for parameter in encoder.parameters()):
        raise CheckpointError(f"encoder {encoder.name}: is on the meta device; build it on a real one to load weights")
    weights = open_weights(encoder, source, activation)
    encoder.set_activation(weights.report.activation)
    with torch.no_grad():
        for name, slot in encoder.state_dict(keep_vars=True).items():
            slot.copy_(weights.read(name))
    return weights.report


def open_weights(encoder: Encoder, source: str | Path, activation: str | None = None) -> PublishedWeights:
    """Published weights for an encoder, opened and checked but not read; what was found is logged.

    Args:
        encoder: The target encoder, on any device (also meta); it is not changed.
        source: As :func:`load_weights` takes it.
        activation: As there.
    Raises:
        CheckpointError: As there.
    """
    where = published_source(encoder) if source == PRETRAINED else source
    opened = open_files(where, lambda names: wanted_names(encoder, names, str(where)))
    format = _detect(encoder, opened.tensors, opened.label)
    if opened.is_joined and not format.joins_files:
        names = ", ".join(file.name for file in opened.files)
        raise CheckpointError(f"{opened.label}: holds several files of tensors ({names}); name one of them")
    translation = format.translate(opened.tensors, encoder.trunk)
    slots: dict[str, Tensor] = encoder.state_dict(keep_vars=True)
    stated = format.options(opened.configs)
    errors = _errors(encoder, slots, translation, stated)
    if any(name not in translation.found for name in slots) and format.note:
        errors.insert(0, format.note)
    label = f"{opened.label} ({format.name}) does not fit encoder {encoder.name}"
    raise_errors(label + _hint(encoder, translation, errors), errors)
    report = LoadedWeights(
        opened.label,
        format.name,
        opened.files,
        sum(found.num_bytes for found in translation.found.values()),
        tuple(translation.skipped),
        stated.get("activation") or activation or format.usual_activation or encoder.info.activation,
        (*translation.resampled, *_resampled(encoder, translation, slots)),
    )
    _log(encoder, format, report, is_stated=bool(stated.get("activation") or activation))
    shapes = {name: tuple(slot.shape) for name, slot in slots.items()}

    def fit(name: str) -> Tensor:
        tensor = translation.found[name].read()
        if tensor.numel() != math.prod(shapes[name]):
            table = tensor.reshape(1, -1, tensor.shape[-1])
            tensor = encoder.resample_positions(table, grid_side(shapes[name][-2], name))
        return tensor.reshape(shapes[name])

    return PublishedWeights(report, translation.found, fit, shapes)


def _log(encoder: Encoder, format: WeightFormat, report: LoadedWeights, is_stated: bool) -> None:
    _logger.info("encoder %s: %s", encoder.name, report)
    if not is_stated and format.usual_activation:
        _logger.warning(
            "encoder %s: %s does not say which activation its weights were trained with; %s is taken, as %s weights "
            "mostly have it. Say activation= if it is another",
            encoder.name,
            report.source,
            report.activation,
            format.name,
        )


def _detect(encoder: Encoder, names: Collection[str], label: str) -> WeightFormat:
    for format in encoder.weight_formats:
        if format.fits(names):
            return format
    known = "".join(f"\n  - {format.name}: with {', '.join(format.marks)}" for format in encoder.weight_formats)
    came = ", ".join(list(names)[:_MAX_NAMED])
    raise CheckpointError(
        f"{label}: is in no format that is known for encoder {encoder.name}. Expected one of:{known}\n"
        f"came {len(names)} tensors: {came}{', ...' if len(names) > _MAX_NAMED else ''}"
    )


def wanted_names(encoder: Encoder, names: Collection[str], label: str) -> list[str]:
    """Select the tensor names of a published model that the encoder needs.

    Args:
        encoder: The target encoder.
        names: All tensor names of an index.
        label: Their location, for messages.
    Raises:
        CheckpointError: They are in no format that is known for the encoder.
    """
    format = _detect(encoder, names, label)
    return [name for name in names if not format.skips(name)]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones, which formats add to tokens and position tables or leave out."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _errors(
    encoder: Encoder, slots: Mapping[str, Tensor], translation: Translation, stated: Mapping[str, Any]
) -> list[str]:
    """What does not fit, the first of every kind before the rest of any, since a long list is cut."""
    found, own = translation.found, encoder.unseen_options()
    shapes = [
        f"{name!r} is {list(found[name].shape)} in the files, {list(slot.shape)} in the encoder"
        for name, slot in slots.items()
        if name in found
        and _squeezed(found[name].shape) != _squeezed(tuple(slot.shape))
        and not _can_resample(encoder, name, found[name], slot)
    ]
    kinds = (
        translation.errors,
        [
            f"{option} is {stated[option]!r} in the files' configuration, {own[option]!r} in the encoder"
            for option in own
            if option in stated and stated[option] != own[option]
        ],
        shapes,
        [f"{name!r} is missing in the files" for name in slots if name not in found],
        [f"{name!r} is in the files but not in the encoder" for name in found if name not in slots],
    )
    return [error for kind in kinds for error in kind[:_MAX_FIRST]] + [
        error for kind in kinds for error in kind[_MAX_FIRST:]
    ]


def _can_resample(encoder: Encoder, name: str, found: FoundTensor, slot: Tensor) -> bool:
    if name != encoder.position_table or found.shape[-1] != slot.shape[-1]:
        return False
    try:
        grid_side(found.shape[-2], name)
    except ShapeError:
        return False
    return True


def _resampled(encoder: Encoder, translation: Translation, slots: Mapping[str, Tensor]) -> list[str]:
    name = encoder.position_table
    if name not in slots:
        return []
    old, new = (grid_side(shape[-2], name) for shape in (translation.found[name].shape, tuple(slots[name].shape)))
    return [] if old == new else [f"{name} from {old}x{old} to {new}x{new}"]


def _hint(encoder: Encoder, translation: Translation, errors: Collection[str]) -> str:
    """The options that the files do fit, where their tensors tell."""
    if not errors:
        return ""
    try:
        sizes = encoder.sizes({name: found.shape for name, found in translation.found.items()})
    except (KeyError, IndexError, ShapeError, ZeroDivisionError):  # too much is missing to tell
        return ""
    listed = ", ".join(f"{option}={value!r}" for option, value in sizes.items())
    return f" (the files are of {listed})" if listed else ""
