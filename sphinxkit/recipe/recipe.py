"""A recipe: a validated document, where it came from, and its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint import Checkpoint
from sphinxkit.checkpoint.yaml_limits import make_yaml, read_yaml_text
from sphinxkit.errors import RecipeError, list_errors
from sphinxkit.recipe.from_config import expand_document
from sphinxkit.recipe.schema import component_defaults, find_errors, model_slots
from sphinxkit.registry import suggest


def shipped_folder() -> Path:
    """Where the recipes that come with sphinxkit are."""
    packaged = Path(str(resources.files("sphinxkit.recipe"))) / "shipped"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with sphinxkit, by name: the file's stem, behind its folder's if it is in one."""
    folder = shipped_folder()
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


@dataclass(frozen=True)
class Recipe:
    """A valid recipe.

    Args:
        document: Content of the file, unchanged.
        source: The file it came from, for messages and for paths beside it; None for a dict.
        trusted: False for the recipe of a checkpoint, which may not name code to import.
    Raises:
        RecipeError: The document is not valid; the message lists every error with its path.
    """

    document: Mapping[str, Any]
    source: Path | None = None
    trusted: bool = True

    def __post_init__(self) -> None:
        errors = find_errors(self.document, self.trusted)
        if errors:
            count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            what = f"recipe {self.source or '(given as a dict)'} has {count}"
            raise RecipeError(list_errors(what, [str(error) for error in errors]))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read and validate a recipe file.

        Raises:
            RecipeError: No such file, not YAML, or not a valid recipe.
        """
        import yaml

        path = Path(path)
        try:
            text = read_yaml_text(path)
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe {path} is not YAML: {error}") from error
        except (OSError, ValueError) as error:  # ValueError: not UTF-8 too
            raise RecipeError(f"recipe {path} cannot be read: {error}") from error
        return cls(_parse_yaml(text, str(path)), path)

    @classmethod
    def of_checkpoint(cls, opened: Checkpoint, trusted: bool = False) -> Recipe:
        """The recipe that a checkpoint's files tell; it may name components, but no code to import unless trusted.

        Raises:
            CheckpointError: The files do not tell.
            RecipeError: What they tell is not valid, or names code.
        """
        return cls(opened.recipe, opened.path / "recipe.yaml", trusted)

    @classmethod
    def find(cls, recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from whatever names one, as :meth:`find_written`, with what lies in files beside it written out.

        That is an ``llm: {type: from_config}`` and a ``conversation: {type: jinja, file: ...}``.

        Raises:
            RecipeError: As there; or the folder that ``from_config`` names is not there or not in the cache.
            CheckpointError: That folder holds another kind of model.
        """
        return cls.find_written(recipe)._expanded()

    @classmethod
    def find_written(cls, recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from whatever names one, as it is written: a shipped name, a path, a dict or a recipe.

        Raises:
            RecipeError: It is none of these, or not valid.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls(recipe)
        if not isinstance(recipe, str | Path):
            raise RecipeError(f"a recipe is a shipped name, a path, a dict or a Recipe, got {type(recipe).__name__}")
        shipped = shipped_recipes()
        if str(recipe) in shipped:
            return cls.from_yaml(shipped[str(recipe)])
        if Path(recipe).suffix in (".yaml", ".yml") or Path(recipe).exists():
            return cls.from_yaml(recipe)
        raise RecipeError(
            f"no recipe {str(recipe)!r}: neither a file nor a shipped name"
            f"{suggest(str(recipe), shipped) or '.'} Shipped: {', '.join(shipped)}"
        )

    def _expanded(self) -> Recipe:
        if self.kind != "model":
            return self
        document = expand_document(self.document, self.source.parent if self.source else Path())
        return self if document is self.document else Recipe(document, self.source, self.trusted)

    @property
    def kind(self) -> str:
        """``model``, ``mixture`` or ``mix``."""
        return str(self.document["kind"])

    def of_kind(self, kind: str) -> Recipe:
        """The recipe itself; RecipeError if it is of another kind."""
        if self.kind != kind:
            raise RecipeError(f"recipe {self.source or self.name}: expected kind {kind}, got kind {self.kind}")
        return self

    @property
    def name(self) -> str:
        """The file's stem, or ``recipe``."""
        return self.source.stem if self.source else "recipe"

    def resolved(self) -> dict[str, Any]:
        """The document with every component's defaults written out, as it is saved beside a checkpoint."""
        document: dict[str, Any] = _copy(self.document)
        if self.kind != "model":
            return document
        for slot in model_slots(document):
            if slot.value is not None:
                holder: Any = document
                for key in slot.path[:-1]:
                    holder = holder[key]
                holder[slot.path[-1]] = component_defaults(slot)
        return document

    def to_yaml(self) -> str:
        """The document as YAML, keys in the file's order."""
        return document_to_yaml(self.document)


def document_to_yaml(document: Mapping[str, Any]) -> str:
    """A recipe's document as YAML, keys in its order; it is not validated."""
    import yaml

    text: str = yaml.safe_dump(_copy(document), sort_keys=False, allow_unicode=True, width=120)
    return text


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(nested) for key, nested in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(nested) for nested in value]
    return value


def _parse_yaml(text: str, where: str) -> Any:
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """A safe loader that refuses a key written twice, which YAML forbids and PyYAML lets the last one win."""

    def mapping(loader: UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"recipe {where}, line {key_node.start_mark.line + 1}: key {key!r} is not a name")
            if key in seen:
                raise RecipeError(f"recipe {where}, line {key_node.start_mark.line + 1}: key {key!r} is written twice")
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return make_yaml(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where} is not YAML: {error}") from error
