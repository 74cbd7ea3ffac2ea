"""What a recipe may say: the structure of each kind, and every component's options from its builder's signature.

``find_faults`` gives every fault of a document at once, each with its path in the file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sphinxkit import encoders, formatters, llama, mixers, projectors, tilers
from sphinxkit.errors import RecipeError, RegistryError
from sphinxkit.registry import Registry, suggest

KeyPath = tuple[str | int, ...]

UNTRUSTED = "nothing of it is imported; if you trust it, pass its recipe.yaml as recipe= (--recipe)"


@dataclass(frozen=True, slots=True)
class Fault:
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
    """One branch of the vision tower: encoders -> mixer -> projector."""

    encoders: list[Component] = Field(min_length=1)
    mixer: Component | None = None
    projector: Component = ComponentSpec("linear")


class VisionSpec(_Strict):
    """The vision tower: one image size, one tiler, branches, and the mixer that joins them."""

    image_size: int = Field(gt=0)
    tiler: Component | None = None
    branches: list[BranchSpec] = Field(min_length=1)
    mixer: Component = ComponentSpec("sequence")


class ModelSpec(_Strict):
    """``kind: model``: a whole SPHINX, or without ``vision`` its language model alone."""

    kind: Literal["model"]
    vision: VisionSpec | None = None
    llm: Component
    conversation: Component = ComponentSpec("sphinx_v1")
    tokenizer: str | None = None  # a SentencePiece model beside the recipe


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a recipe that holds a component.

    Args:
        path: Of the component.
        value: What stands there, not validated.
        registry: Of its family.
        wired: Builder parameters that assembly fills in.
        assembly: Keys that assembly itself reads, positive whole numbers; they are not the builder's.
    """

    path: KeyPath
    value: Any
    registry: Registry[Any]
    wired: tuple[str, ...] = ()
    assembly: tuple[str, ...] = ()


def _get(value: Any, *keys: str | int) -> Any:
    for key in keys:
        if isinstance(key, int):
            value = value[key] if isinstance(value, list) and key < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def model_slots(document: Mapping[str, Any]) -> Iterator[Slot]:
    """Every component of a ``kind: model`` document, as far as its structure can be made out."""
    yield Slot(("llm",), _get(document, "llm"), llama.registry)
    yield Slot(("conversation",), _get(document, "conversation"), formatters.registry)
    yield Slot(("vision", "tiler"), _get(document, "vision", "tiler"), tilers.registry)
    yield Slot(("vision", "mixer"), _get(document, "vision", "mixer"), mixers.registry)
    for i, branch in enumerate(_list(_get(document, "vision", "branches"))):
        path: KeyPath = ("vision", "branches", i)
        for j, encoder in enumerate(_list(_get(branch, "encoders"))):
            yield Slot((*path, "encoders", j), encoder, encoders.registry, assembly=("tile_size",))
        yield Slot((*path, "mixer"), _get(branch, "mixer"), mixers.registry, wired=("embed_dims",))
        yield Slot((*path, "projector"), _get(branch, "projector"), projectors.registry, wired=("in_dim", "out_dim"))


def _readable(error: Any, known: list[str]) -> str:
    if error["type"] == "extra_forbidden":
        others = f"; known: {', '.join(sorted(known))}" if known else ""
        return f"unknown key{suggest(str(error['loc'][-1]), known) or others}"
    if error["type"] == "missing":
        return "required key is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{message}, got {error['input']!r}"


def _validate(model: type[BaseModel], document: Any, path: KeyPath) -> list[Fault]:
    """Validate as JSON in strict mode: a list may fill a tuple and 1 a float, but "1" is no number."""
    try:
        model.model_validate_json(json.dumps(document, default=repr), strict=True)
    except ValidationError as invalid:
        return [
            Fault(path + tuple(error["loc"]), _readable(error, _known_keys(model, tuple(error["loc"]))))
            for error in invalid.errors()
        ]
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


def _component_faults(slot: Slot, trusted: bool) -> list[Fault]:
    try:
        spec = _component(slot.value)
    except ValueError:
        return []  # the structure's validation reports it
    if not isinstance(spec, ComponentSpec):
        return []
    place = (*slot.path, "type") if isinstance(slot.value, Mapping) else slot.path
    if not trusted and ":" in spec.type and not slot.registry.has_imported(spec.type):
        return [Fault(place, f"names code to import, {spec.type!r}, and comes with a checkpoint: {UNTRUSTED}")]
    try:
        model = _options_model(slot.registry, spec.type, slot.wired)
        parameters = inspect.signature(slot.registry.get(spec.type)).parameters
    except RegistryError as error:
        return [Fault(place, str(error))]
    faults = []
    lacking = [name for name in slot.wired if name not in parameters]
    if lacking and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        faults.append(Fault(place, f"{spec.type!r} cannot stand here: it takes no {', '.join(lacking)}"))
    options = dict(spec.options)
    for key in slot.assembly:
        value = options.pop(key, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            faults.append(Fault((*slot.path, key), f"expected a positive int, got {value!r}"))
    for key in slot.wired:
        if key in options:
            del options[key]
            faults.append(Fault((*slot.path, key), "is wired by assembly and cannot be written"))
    return faults + _validate(model, options, slot.path)


def component_defaults(slot: Slot) -> dict[str, Any]:
    """A valid slot's component with every default written out: ``{type: name, option: value, ...}``."""
    spec = _component(slot.value)
    options = {key: value for key, value in spec.options.items() if key not in slot.assembly}
    model = _options_model(slot.registry, spec.type, slot.wired)
    filled = model.model_validate_json(json.dumps(options), strict=True).model_dump(mode="json")
    return {"type": spec.type, **filled, **{key: value for key, value in spec.options.items() if key in slot.assembly}}


def _model_faults(document: Mapping[str, Any], trusted: bool = True) -> list[Fault]:
    faults = _validate(ModelSpec, document, ())
    for slot in model_slots(document):
        faults += _component_faults(slot, trusted)
    return faults


def _mixture_faults(document: Mapping[str, Any]) -> list[Fault]:
    from sphinxkit.data.mixture import Mixture

    return _validate(_options_of(Mixture), _without_kind(document), ())


def _mix_faults(document: Mapping[str, Any]) -> list[Fault]:
    from sphinxkit.interpolation import MixPlan

    fields = _without_kind(document)
    faults = _validate(_options_of(MixPlan), fields, ())
    if not faults:
        try:
            MixPlan(**fields)
        except RecipeError as error:
            faults = [Fault((), line) for line in str(error).splitlines()]
    return faults


def _train_faults(document: Mapping[str, Any]) -> list[Fault]:
    """The plan's own faults, and those of the model and the mixtures that are written inside of it."""
    registry: Registry[Any] = Registry("recipe")
    plan = "sphinxkit.training.plan:TrainPlan"  # of a layer above this one, so it is named as a plug-in is
    fields = _without_kind(document)
    faults = _validate(registry.options_model(plan), fields, ())
    model = fields.get("model")
    if isinstance(model, Mapping):
        faults += [Fault(("model", *fault.path), fault.message) for fault in find_faults(model)]
    for name in fields["data"] if isinstance(fields.get("data"), Mapping) else ():
        mixture = _get(fields, "data", name, "mixture")
        if isinstance(mixture, Mapping) and "type" not in mixture:
            path = ("data", name, "mixture")
            faults += [Fault((*path, *fault.path), fault.message) for fault in _mixture_faults(mixture)]
    if not faults:
        try:
            registry.build(plan, **fields)
        except RecipeError as error:
            faults = [Fault((), line) for line in str(error).splitlines()]
    return faults


def _options_of(builder: Callable[..., Any]) -> type[BaseModel]:
    return Registry("recipe", {"this": builder}).options_model("this")


def _without_kind(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "kind"}


KINDS: dict[str, Callable[[Mapping[str, Any]], list[Fault]]] = {
    "model": _model_faults,
    "mixture": _mixture_faults,
    "mix": _mix_faults,
    "train": _train_faults,
}


def find_faults(document: Any, trusted: bool = True) -> list[Fault]:
    """Every fault of a recipe document, in the order of the file's sections; an empty list when it is valid.

    Args:
        document: What the YAML file holds.
        trusted: Whether ``package.module:builder`` may be imported; False for what comes with a checkpoint, which is
            of kind ``model`` and may name no code but what this process has imported by such a path before.
    """
    if not isinstance(document, Mapping):
        return [Fault((), f"a recipe is a mapping, got {type(document).__name__}")]
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        hint = suggest(kind, KINDS) if isinstance(kind, str) else ""
        return [Fault(("kind",), f"expected one of {', '.join(KINDS)}, got {kind!r}{hint}")]
    if trusted:
        return KINDS[kind](document)
    if kind != "model":
        return [Fault(("kind",), f"a checkpoint's recipe is of kind model, got {kind!r}")]
    return _model_faults(document, trusted)
