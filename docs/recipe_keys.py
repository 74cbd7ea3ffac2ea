"""Write the reference of the recipes' keys from the schema that validates them; meanings are the docstrings'."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sphinxkit.data.mixture import Mixture, MixtureSource
from sphinxkit.interpolation import MixPlan
from sphinxkit.recipe import schema
from sphinxkit.registry import Registry
from sphinxkit.training import plan

HEAD = """# Recipe keys

Every key of every kind of recipe, made from the schema that checks them. [Recipes](../recipes.md) explains how to write
one. `sphinxkit check FILE` names everything that is wrong in one.

A *component* is a name, or `{type: name, option: value}`. Its options are [below](#options-of-components). None is
written `null` in YAML.
"""
FAMILIES = {  # what a recipe says -> the family's module, and the options that assembly fills in
    "encoders": ("sphinxkit.encoders", ()),
    "mixer": ("sphinxkit.mixers", ("embed_dims",)),
    "projector": ("sphinxkit.projectors", ("in_dim", "out_dim")),
    "tiler": ("sphinxkit.tilers", ()),
    "llm": ("sphinxkit.llama", ()),
    "conversation": ("sphinxkit.formatters", ()),
}
ENTRY = re.compile(r"^    (\w+)(?: \([^)]*\))?: (.*(?:\n {8}.*)*)", re.MULTILINE)


def meanings(builder: Any) -> dict[str, str]:
    """Key -> what the builder's docstring says of it, in Markdown; passed-on options have the built class's."""
    built = typing.get_type_hints(builder).get("return") if inspect.isfunction(builder) else None
    inherited = meanings(built) if inspect.isclass(built) else {}
    text = re.sub(r":\w+:`[~.]?([^`]*)`", r"`\1`", inspect.getdoc(builder) or "").replace("``", "`")
    return inherited | {name: " ".join(words.split()).replace("|", "\\|") for name, words in ENTRY.findall(text)}


def _type(annotation: Any) -> str:
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
        return _type(kinds[0])
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in kinds)
    text = inspect.formatannotation(annotation)
    if "ComponentSpec" in text:
        return "list of components" if text.startswith("list") else "component"
    text = re.sub(r"(?:\w+\.)+(\w+)", r"\1", text).replace(" | None", "")
    text = re.sub(r"\bSequence\b", "list", re.sub(r"\b\w+(?:Spec|Plan|Source)\b|dict\[str, Any\]", "mapping", text))
    return re.sub(r"Annotated\[(\w+), .*\]\]", r"\1]", text).replace(" | ", " or ")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if hasattr(value, "type"):
        value = value.type
    if value is None or value == "":
        return "none" if value is None else '`""`'
    return f"`{value}`" if isinstance(value, str) else f"`{value}`".replace("'", "")


def table(model: Any, builder: Any) -> Iterator[str]:
    """The keys of one pydantic model, and what its builder says of each."""
    words = meanings(builder)
    if not model.model_fields:
        yield "No options.\n"
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        yield f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {words.get(name, '')} |"
    yield ""


def _options(builder: Any, wired: tuple[str, ...] = ()) -> Any:
    return Registry("recipe", {"this": builder}).options_model("this", wired)


def components() -> Iterator[str]:
    """The options of every component; the sizes of a language model stand with their family's first."""
    for part, (module, wired) in FAMILIES.items():
        registry = importlib.import_module(module).registry
        names = ["llama"] if part == "llm" else registry.names()
        for name in names:
            builder = registry.get(name)
            if builder.__module__.startswith("sphinxkit."):  # plug-ins of this machine are not ours to list
                yield f"### `{part}`: `{name}`\n"
                yield from table(_options(builder, wired), builder)
                if part == "llm":
                    others = ", ".join(f"`{other}`" for other in registry.names() if other != name)
                    yield f"Of a published size each number has its own default: {others}.\n"


def page() -> str:
    """The page, in Markdown."""
    parts = (
        (2, "`kind: model`", schema.ModelSpec),
        (3, "`vision`", schema.VisionSpec),
        (3, "`vision.branches`, each", schema.BranchSpec),
        (2, "`kind: train`", plan.TrainPlan),
        (3, "`data`, each stream", plan.StreamPlan),
        (3, "`lora`", plan.LoraPlan),
        (3, "`evaluate`", plan.EvaluationPlan),
        (3, "`evaluate.benchmarks`, each", plan.BenchmarkPlan),
        (2, "`kind: mixture`", Mixture),
        (3, "`sources`, each", MixtureSource),
        (2, "`kind: mix`", MixPlan),
    )
    lines = [HEAD]
    for depth, title, builder in parts:
        lines += [f"{'#' * depth} {title}\n"]
        lines += table(builder if hasattr(builder, "model_fields") else _options(builder), builder)
    return "\n".join([*lines, "## Options of components\n", *components()])


def write(path: Path) -> None:
    """Write the page if it changed."""
    text = page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
