"""A conformance check for encoders, including custom ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sphinxkit.encoders.base import Encoder, EncoderInfo
from sphinxkit.errors import ShapeError, SphinxkitError
from sphinxkit.features import VisionFeatures

# Rows of a batch may differ from the same rows alone by rounding: matrix products sum in another order for another
# batch size. Relative to the largest feature: two decimal digits above one unit of the dtype's precision, at most 5 %
# (half precision). Our choice.
_ROUNDING_UNITS = 100.0
_ROUNDING_CAP = 0.05


def _check_facts(encoder: Any) -> list[str]:
    breaches = []
    facts: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
        ("name", str, bool, "a non-empty string"),
        ("embed_dim", int, lambda value: value > 0, "a positive int"),
        ("num_prefix_tokens", int, lambda value: value >= 0, "an int of at least 0"),
        ("input_size", int, lambda value: value > 0, "a positive int"),
        ("grid_size", tuple, lambda value: len(value) == 2 and min(value) >= 0, "a pair (H, W)"),
        ("info", EncoderInfo, lambda value: True, "an EncoderInfo"),
        ("trainable", bool, lambda value: True, "a bool"),
    )
    for name, kind, accepts, expected in facts:
        value = getattr(encoder, name, None)
        if not isinstance(value, kind) or not accepts(value):
            breaches.append(f"fact: {name} must be {expected}, got {value!r}")
    if not breaches and encoder.info.input_size != encoder.input_size:
        breaches.append(f"fact: info.input_size {encoder.info.input_size} differs from input_size {encoder.input_size}")
    if not breaches and any(value <= 0 for value in encoder.info.std):
        breaches.append(f"fact: info.std must be positive, got {encoder.info.std}")
    return breaches


def _check_shapes(encoder: Encoder, features: object, batch_size: int, what: str) -> list[str]:
    if not isinstance(features, VisionFeatures):
        return [f"{what}: forward must return VisionFeatures, got {type(features).__name__}"]
    expected = {
        "batch": (features.batch_size, batch_size, "the pixels' batch"),
        "width": (features.embed_dim, encoder.embed_dim, "embed_dim"),
        "prefix": (features.prefix.shape[1], encoder.num_prefix_tokens, "num_prefix_tokens"),
        "grid": (tuple(features.grid), tuple(encoder.grid_size), "grid_size"),
    }
    return [
        f"{what}: {key} {got} differs from {name} {want}" for key, (got, want, name) in expected.items() if got != want
    ]


def _check_values(encoder: Encoder, features: VisionFeatures, dtype: torch.dtype) -> list[str]:
    breaches = [
        f"dtype: {name} is {tokens.dtype}, the parameters are {dtype}"
        for name, tokens in (("prefix", features.prefix), ("patches", features.patches))
        if tokens.dtype != dtype
    ]
    if not bool(torch.isfinite(features.tokens()).all()):
        breaches.append("values: the features are not all finite")
    return breaches


def _check_freezing(encoder: Encoder, pixels: Tensor) -> list[str]:
    breaches = []
    parameters = dict(encoder.named_parameters())
    wrong = [name for name, parameter in parameters.items() if parameter.requires_grad != encoder.trainable]
    if wrong:
        fault = (
            "do not require gradients although trainable" if encoder.trainable else "require gradients although frozen"
        )
        breaches.append(f"freezing: {len(wrong)} of {len(parameters)} parameters {fault}, the first is {wrong[0]}")
    tokens = encoder(pixels.clone().requires_grad_()).tokens()
    if tokens.requires_grad != encoder.trainable:
        state = "is trainable but builds no graph" if encoder.trainable else "is frozen but builds a graph"
        breaches.append(f"freezing: the encoder {state}")
    return breaches


def _check_eval_safety(encoder: Encoder, pixels: Tensor, before: Tensor) -> list[str]:
    """``train()`` on the model around a frozen encoder must change nothing; a trainable one must follow it."""
    around = nn.ModuleList([encoder]).train()
    awake = [name or type(encoder).__name__ for name, module in encoder.named_modules() if module.training]
    if encoder.trainable:
        return [] if encoder.training else ["eval-safety: the encoder is trainable but does not follow train()"]
    breaches = []
    if awake:
        breaches.append(f"eval-safety: train() wakes {len(awake)} modules of a frozen encoder, the first is {awake[0]}")
    if not torch.equal(encoder(pixels).tokens(), before):
        breaches.append("eval-safety: the features of a frozen encoder change after train()")
    around.eval()
    return breaches


def _check_rows(encoder: Encoder, pixels: Tensor, together: Tensor) -> list[str]:
    relative = min(_ROUNDING_UNITS * torch.finfo(together.dtype).eps, _ROUNDING_CAP)
    tolerance = relative * float(together.abs().max())
    worst = 0.0
    for row in range(pixels.shape[0]):
        alone = encoder(pixels[row : row + 1]).tokens()
        worst = max(worst, float((alone - together[row : row + 1]).abs().max()))
    backwards = encoder(pixels.flip(0)).tokens().flip(0)
    worst = max(worst, float((backwards - together).abs().max()))
    if worst > tolerance:
        return [f"rows: a row's features depend on the rest of the batch: {worst:.2e} off, rounding is {tolerance:.2e}"]
    return []


def _check_inputs(encoder: Encoder, pixels: Tensor, together: Tensor) -> list[str]:
    breaches = []
    if torch.equal(together[0], together[1]):
        breaches.append("values: two different images give the same features")
    for other_size in (encoder.input_size + 8, max(encoder.input_size // 2, 1)):
        other = pixels.new_ones(1, 3, other_size, other_size)
        try:
            breaches += _check_shapes(encoder, encoder(other), 1, f"pixels of side {other_size}")
        except Exception as error:  # whatever somebody else's module raises is the finding
            breaches.append(f"pixels of side {other_size}: {type(error).__name__}: {error}")
    try:
        narrow = encoder(pixels[:1].to(torch.bfloat16))
        if narrow.tokens().dtype != together.dtype:
            breaches.append(
                f"dtype: bfloat16 pixels give {narrow.tokens().dtype}, not the parameters' {together.dtype}"
            )
    except Exception as error:  # as above
        breaches.append(f"bfloat16 pixels: {type(error).__name__}: {error}")
    wrong_inputs = {
        "integer pixels": torch.zeros(1, 3, encoder.input_size, encoder.input_size, dtype=torch.uint8),
        "pixels without a batch": pixels[0],
        "four channels": torch.cat([pixels[:1], pixels[:1, :1]], dim=1),
        "pixels that are not square": pixels[:1, :, :, : encoder.input_size // 2],
    }
    for what, wrong in wrong_inputs.items():
        try:
            encoder(wrong.to(pixels.device))
            breaches.append(f"errors: {what} must raise a ShapeError, nothing was raised")
        except ShapeError:
            continue
        except Exception as error:  # as above
            breaches.append(f"errors: {what} must raise a ShapeError, got {type(error).__name__}: {error}")
    return breaches


def _run(encoder: Any, batch_size: int, seed: int) -> list[str]:
    parameter = next((p for p in encoder.parameters() if p.is_floating_point()), torch.zeros(()))
    if parameter.is_meta:
        return ["parameters: they are on the meta device and hold no values; materialise them first"]
    generator = torch.Generator().manual_seed(seed)
    side = encoder.input_size
    pixels = torch.randn(batch_size, 3, side, side, generator=generator).to(parameter.device)
    given = pixels.clone()
    breaches: list[str] = []
    try:
        features = encoder(pixels)
    except Exception as error:  # whatever somebody else's module raises is the finding
        return [f"forward: {tuple(pixels.shape)} pixels raise {type(error).__name__}: {error}"]
    if not torch.equal(pixels, given):
        breaches.append("pixels: forward changes them in place")
        pixels = given.clone()
    faults = _check_shapes(encoder, features, batch_size, "shapes")
    if faults:
        return breaches + faults
    breaches += _check_values(encoder, features, parameter.dtype)
    tokens = features.tokens().detach()
    if not torch.equal(encoder(pixels).tokens(), tokens):
        return [*breaches, "determinism: two calls on the same pixels give different features"]
    with torch.no_grad():
        breaches += _check_rows(encoder, pixels, tokens)
        breaches += _check_inputs(encoder, pixels, tokens)
    breaches += _check_freezing(encoder, pixels)
    breaches += _check_eval_safety(encoder, pixels, tokens)
    return breaches


def check_encoder(encoder: nn.Module, *, batch_size: int = 3, seed: int = 0, strict: bool = False) -> list[str]:
    """Find where an encoder breaks the contract that mixers, tilers and ``SphinxModel`` rely on.

    Checked: the facts (``name``, ``embed_dim``, ``num_prefix_tokens``, ``input_size``, ``grid_size``, ``info``,
    ``trainable``) and that the features agree with them; dtype; finite values that depend on the image; determinism;
    that a frozen encoder stays in eval mode when ``train()`` is called on the model around it; frozen parameters and no
    autograd graph (or gradients, when trainable); that a row does not depend on the rest of its batch; pixels of other
    sizes and dtypes; a named error for input that is no batch of square images; that the pixels are not changed. The
    encoder runs about ten times on random pixels, in eval mode; afterwards it has the mode it came in.

    Args:
        encoder: Any module meant as an encoder, with values (not on the meta device).
        batch_size: Images in the batch, at least 2.
        seed: Seed of the random pixels; the global random state is not changed.
        strict: Raise instead of returning the breaches.
    Returns:
        One message for each breach, which begins with its kind; empty if the encoder conforms.
    Raises:
        ShapeError: ``batch_size`` below 2.
        SphinxkitError: ``strict`` and there are breaches; the message lists them.
    """
    if batch_size < 2:
        raise ShapeError(f"check_encoder: batch_size must be at least 2 to compare rows, got {batch_size}")
    breaches = _check_facts(encoder)
    if not breaches:
        modes = {module: module.training for module in encoder.modules()}
        encoder.eval()
        try:
            breaches = _run(encoder, batch_size, seed)
        finally:
            for module, mode in modes.items():
                module.training = mode
    if breaches and strict:
        raise SphinxkitError(f"{type(encoder).__name__} is not a conforming encoder:\n- " + "\n- ".join(breaches))
    return breaches
