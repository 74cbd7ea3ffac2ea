"""Schema of recipes: the structure of each kind, and each component's options from its builder's signature.

``find_errors`` gives everything that is wrong with a document at once, each with its path in the file.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sphinxkit import encoders, formatters, llama, mixers, projectors, tilers
from sphinxkit.errors import RecipeError, RegistryError
from sphinxkit.recipe.from_config import FROM_CONFIG, from_config
from sphinxkit.registry import Registry, suggest

KeyPath = tuple[str | int, ...]

WEIGHTS = "weights"
"""The key beside an encoder that says where its weights are."""

MAX_SHOWN = 200  # characters of a value in a message; our choice

UNTRUSTED = "nothing of it is imported; if you trust it, pass its recipe.yaml as recipe="


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that is wrong with a recipe, and where."""

    path: KeyPath
    message: str

    def __str__(self) -> str:
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path).lstrip(".")
        return f"{where}: {self.message}" if where else self.message


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """A component as a recipe names it: ``name`` or ``{type: name, option: value, ...}``."""

    type: str
    options: dict[str, Any] = field(default_factory=dict)


def _component(value: Any) -> Any:
    if isinstance(value, str):
        return ComponentSpec(value)
    if isinstance(value, Mapping):
        if not isinstance(value.get("type"), str):
            raise ValueError("a component is a name, or a mapping with `type: name` and its options")
        return ComponentSpec(value["type"], {key: option for key, option in value.items() if key != "type"})
    return value


Component = Annotated[ComponentSpec, BeforeValidator(_component)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class BranchSpec(_Strict):
    """One branch of the vision tower: encoders -> mixer -> projector.

    Attributes:
        encoders: One or more; a mixer joins the features of several.
        mixer: Joins the encoders' features; None: there is one encoder.
        projector: Brings the tokens to the language model's width.
    """

    encoders: list[Component] = Field(min_length=1)
    mixer: Component | None = None
    projector: Component = ComponentSpec("linear")


class VisionSpec(_Strict):
    """The vision tower: one image size, one tiler, branches, and the mixer that joins them.

    Attributes:
        image_size: Side of the square that an image is padded and resized to, in pixels.
        tiler: Cuts the image into views; None: one view, the whole image.
        branches: One or more; every branch sees every view.
        mixer: Joins the branches' tokens of a view.
    """

    image_size: int = Field(gt=0)
    tiler: Component | None = None
    branches: list[BranchSpec] = Field(min_length=1)
    mixer: Component = ComponentSpec("sequence")


class ModelSpec(_Strict):
    """``kind: model``: a whole SPHINX, or without ``vision`` its language model alone.

    Attributes:
        kind: What the recipe describes.
        vision: Encoders, mixers, projectors and tiler; None: the model is text-only.
        llm: A published size, ``llama`` with numbers of your own, or ``{type: from_config, path: ...}``: the numbers
            of a Hugging Face folder.
        conversation: The template that makes one text of the messages.
        tokenizer: ``tokenizer.model`` or ``tokenizer.json`` beside the recipe; None: the checkpoint brings it.
        end_ids: Token ids that end an answer, besides the tokenizer's end-of-sentence.
    """

    kind: Literal["model"]
    vision: VisionSpec | None = None
    llm: Component
    conversation: Component = ComponentSpec("sphinx_v1")
    tokenizer: str | None = None
    end_ids: list[Annotated[int, Field(ge=0)]] = []


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a recipe that holds a component.

    Args:
        path: Of the component.
        value: The value there, not validated.
        registry: Of its family.
        wired: Builder parameters that assembly fills in.
        assembly: Keys that assembly itself reads, which are not the builder's, and what each must be.
    """

    path: KeyPath
    value: Any
    registry: Registry[Any]
    wired: tuple[str, ...] = ()
    assembly: Mapping[str, Literal["a positive int", "a source of weights"]] = field(default_factory=dict)


def _get(value: Any, *keys: str | int) -> Any:
    for key in keys:
        if isinstance(key, int):
            value = value[key] if isinstance(value, list) and key < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


_OF_ENCODERS: Mapping[str, Literal["a positive int", "a source of weights"]] = {
    "tile_size": "a positive int",
    WEIGHTS: "a source of weights",
}


_WORDS: Registry[Any] = Registry("language model", {FROM_CONFIG: from_config})


def model_slots(document: Mapping[str, Any]) -> Iterator[Slot]:
    """Every component of a ``kind: model`` document, as far as its structure can be made out."""
    llm = _get(document, "llm")
    is_word = _get(llm, "type") == FROM_CONFIG
    yield Slot(("llm",), llm, _WORDS if is_word else llama.registry)
    yield Slot(("conversation",), _get(document, "conversation"), formatters.registry)
    yield Slot(("vision", "tiler"), _get(document, "vision", "tiler"), tilers.registry)
    yield Slot(("vision", "mixer"), _get(document, "vision", "mixer"), mixers.registry)
    for i, branch in enumerate(_list(_get(document, "vision", "branches"))):
        path: KeyPath = ("vision", "branches", i)
        for j, encoder in enumerate(_list(_get(branch, "encoders"))):
            yield Slot((*path, "encoders", j), encoder, encoders.registry, assembly=_OF_ENCODERS)
        yield Slot((*path, "mixer"), _get(branch, "mixer"), mixers.registry, wired=("embed_dims",))
        yield Slot((*path, "projector"), _get(branch, "projector"), projectors.registry, wired=("in_dim", "out_dim"))


def _readable(error: Any, model: type[BaseModel], document: Any) -> str:
    if error["type"] == "extra_forbidden":
        *place, key = error["loc"]
        known = _known_keys(model, (*place, key))
        others = f"; known: {', '.join(sorted(known))}" if known else ""
        return f"unknown key{suggest(str(key), known, _get(document, *place) or ()) or others}"
    if error["type"] == "missing":
        return "required key is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{message}, got {shortened(error['input'])}"


def shortened(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _validate(model: type[BaseModel], document: Any, path: KeyPath) -> list[FieldError]:
    """Validate as JSON in strict mode: a list may fill a tuple and 1 a float, but "1" is no number."""
    try:
        model.model_validate_json(json.dumps(document, default=repr), strict=True)
    except ValidationError as invalid:
        return [FieldError(path + tuple(error["loc"]), _readable(error, model, document)) for error in invalid.errors()]
    return []


def _known_keys(model: type[BaseModel], location: KeyPath) -> list[str]:
    """The keys that the model nested at ``location`` (its last key left out) knows."""
    current: Any = model
    for key in location[:-1]:
        if isinstance(key, int):
            continue
        annotation = current.model_fields[key].annotation if key in current.model_fields else None
        found = list(_nested_models(annotation))
        if not found:
            return []
        current = found[0]
    return list(current.model_fields)


def _nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _nested_models(argument)


@cache
def _options_model(registry: Registry[Any], name: str, wired: tuple[str, ...]) -> type[BaseModel]:
    return registry.options_model(name, wired)


_IS: Mapping[str, Callable[[Any], bool]] = {
    "a positive int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    "a source of weights": lambda value: isinstance(value, str) and value.strip() != "",
}


def _component_errors(slot: Slot, trusted: bool) -> list[FieldError]:
    try:
        spec = _component(slot.value)
    except ValueError:
        return []  # the structure's validation reports it
    if not isinstance(spec, ComponentSpec):
        return []
    place = (*slot.path, "type") if isinstance(slot.value, Mapping) else slot.path
    if not trusted and ":" in spec.type and not slot.registry.has_imported(spec.type):
        return [FieldError(place, f"names code to import, {spec.type!r}, and comes with a checkpoint: {UNTRUSTED}")]
    if not trusted and slot.registry is _WORDS:
        return [FieldError(place, "a checkpoint's recipe gives the language model's numbers, not where they are")]
    try:
        model = _options_model(slot.registry, spec.type, slot.wired)
        parameters = inspect.signature(slot.registry.get(spec.type)).parameters
    except RegistryError as error:
        return [FieldError(place, str(error))]
    errors = []
    lacking = [name for name in slot.wired if name not in parameters]
    if lacking and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        errors.append(FieldError(place, f"{spec.type!r} cannot stand here: it takes no {', '.join(lacking)}"))
    options = dict(spec.options)
    for key, expected in slot.assembly.items():
        value = options.pop(key, None)
        if value is not None and not _IS[expected](value):
            errors.append(FieldError((*slot.path, key), f"expected {expected}, got {shortened(value)}"))
    for key in slot.wired:
        if key in options:
            del options[key]
            errors.append(FieldError((*slot.path, key), "is wired by assembly and cannot be written"))
    return errors + _validate(model, options, slot.path)


def component_defaults(slot: Slot) -> dict[str, Any]:
    """A valid slot's component with every default written out: ``{type: name, option: value, ...}``.

    Where weights come from is left out: a checkpoint beside the result holds them.
    """
    spec = _component(slot.value)
    options = {key: value for key, value in spec.options.items() if key not in slot.assembly}
    model = _options_model(slot.registry, spec.type, slot.wired)
    filled = model.model_validate_json(json.dumps(options), strict=True).model_dump(mode="json")
    kept = {key: value for key, value in spec.options.items() if key in slot.assembly and key != WEIGHTS}
    return {"type": spec.type, **filled, **kept}


def _model_errors(document: Mapping[str, Any], trusted: bool = True) -> list[FieldError]:
    errors = _validate(ModelSpec, document, ())
    for slot in model_slots(document):
        errors += _component_errors(slot, trusted)
    return errors


def _mixture_errors(document: Mapping[str, Any]) -> list[FieldError]:
    from sphinxkit.data.mixture import Mixture

    return _validate(_options_of(Mixture), _without_kind(document), ())


def _mix_errors(document: Mapping[str, Any]) -> list[FieldError]:
    from sphinxkit.interpolation import MixPlan

    fields = _without_kind(document)
    errors = _validate(_options_of(MixPlan), fields, ())
    if not errors:
        try:
            MixPlan(**fields)
        except RecipeError as error:
            errors = [FieldError((), line) for line in str(error).splitlines()]
    return errors


@cache
def mixtures() -> Registry[Any]:
    """What ``type`` may name in a stream's mixture: ``files``, the usual one, or code."""
    from sphinxkit.data.mixture import Mixture

    return Registry("mixture", {"files": Mixture})


def stream_mixtures(document: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any]]:
    """The mixture of every stream of a training recipe, the evaluation's too, with its place; nothing is validated."""
    for place in (("data",), ("evaluate", "data")):
        streams = _get(document, *place)
        for name in streams if isinstance(streams, Mapping) else ():
            yield (*place, name, "mixture"), _get(streams, name, "mixture")


def _train_errors(document: Mapping[str, Any]) -> list[FieldError]:
    """The plan's own errors, and those of the model and the mixtures that are written inside of it."""
    plan = "train"
    builder = import_module("sphinxkit.training.plan").TrainPlan  # of a layer above this one, so it is imported by name
    registry: Registry[Any] = Registry("recipe", {plan: builder})
    fields = _without_kind(document)
    renamed: Mapping[str, str] = getattr(builder, "renamed_keys", {})
    errors = [FieldError((key,), f"is now called {renamed[key]!r}") for key in fields if key in renamed]
    errors += _validate(registry.options_model(plan), {k: v for k, v in fields.items() if k not in renamed}, ())
    model = fields.get("model")
    if isinstance(model, Mapping):
        errors += [FieldError(("model", *found.path), found.message) for found in find_errors(model)]
    for path, mixture in stream_mixtures(fields):
        if isinstance(mixture, Mapping) and "type" in mixture:
            errors += _component_errors(Slot(path, {"batch_size": 1, **mixture}, mixtures()), trusted=True)
        elif isinstance(mixture, Mapping):
            errors += [FieldError((*path, *found.path), found.message) for found in _mixture_errors(mixture)]
    if not errors:
        try:
            registry.build(plan, **fields)
        except RecipeError as error:
            errors = [FieldError((), line) for line in str(error).splitlines()]
    return errors


def _options_of(builder: Callable[..., Any]) -> type[BaseModel]:
    return Registry("recipe", {"this": builder}).options_model("this")


def _without_kind(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "kind"}


KINDS: dict[str, Callable[[Mapping[str, Any]], list[FieldError]]] = {
    "model": _model_errors,
    "mixture": _mixture_errors,
    "mix": _mix_errors,
    "train": _train_errors,
}


NO_TEXT = re.compile("[\0\ud800-\udfff]")  # names no file: NUL, and halves of characters


def _odd_values(value: Any, path: KeyPath) -> Iterator[FieldError]:
    """Values that a recipe cannot hold: YAML writes dates, bytes, sets and text that names no file, too."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _odd_values(key, path) if isinstance(key, str) else ()
            yield from _odd_values(each, (*path, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _odd_values(each, (*path, index))
    elif isinstance(value, str):
        if NO_TEXT.search(value):
            yield FieldError(path, f"expected text without NUL and half characters, got {shortened(value)}")
    elif value is not None and not isinstance(value, int | float):
        yield FieldError(path, f"expected text, a number, a list or a mapping, got {shortened(value)}")


def find_errors(document: Any, trusted: bool = True) -> list[FieldError]:
    """Everything that is wrong with a recipe document, in the order of the file's sections; empty if it is valid.

    Args:
        document: What the YAML file holds.
        trusted: Whether ``package.module:builder`` may be imported; False for what comes with a checkpoint, which is
            of kind ``model`` and may name no code but what this process has imported by such a path before.
    """
    if not isinstance(document, Mapping):
        return [FieldError((), f"a recipe is a mapping, got {type(document).__name__}")]
    odd = list(_odd_values(document, ()))
    if odd:
        return odd
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = suggest(kind, KINDS) if isinstance(kind, str) else ""
        return [FieldError(("kind",), f"expected one of {', '.join(KINDS)}, got {shortened(kind)}{hint}")]
    if trusted:
        return KINDS[kind](document)
    if kind != "model":
        return [FieldError(("kind",), f"a checkpoint's recipe is of kind model, got {kind!r}")]
    return _model_errors(document, trusted)
