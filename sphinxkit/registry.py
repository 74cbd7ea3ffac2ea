"""Names to builders, one registry per component family.

Only the standard library is imported here; pydantic comes in with ``options_model``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sphinxkit.errors import RegistryError

if TYPE_CHECKING:
    from pydantic import BaseModel

T = TypeVar("T")
B = TypeVar("B", bound=Callable[..., Any])

ENTRY_POINT_GROUP = "sphinxkit.plugins"


def suggest(name: str, known: Iterable[str], given: Collection[str] = ()) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or an empty string.

    Args:
        name: The unknown name.
        known: Known names.
        given: Names that are there already, such as the other keys; none of them is proposed, nor what is less like.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close and close[0] not in given else ""


_may_import: ContextVar[bool] = ContextVar("may_import", default=True)


_HARMLESS = frozenset({"sphinxkit.nano.world:WorldMixture"})
"""Of our own, named by path in the recipes that we ship: it only computes."""


@contextmanager
def no_imports() -> Iterator[None]:
    """Within it no registry imports ``package.module:builder``; what a registry imported before stays known to it."""
    token = _may_import.set(False)
    try:
        yield
    finally:
        _may_import.reset(token)


def from_fields(kind: Callable[..., T], fields: Mapping[str, Any], where: str) -> T:
    """A dataclass from a mapping of its fields.

    Args:
        kind: The dataclass.
        fields: Name -> value.
        where: For messages.
    Raises:
        RegistryError: A field is unknown or missing.
    """
    known = inspect.signature(kind).parameters
    for key in fields:
        if key not in known:
            hint = suggest(str(key), known, fields) or f"; known: {', '.join(known)}"
            raise RegistryError(f"{where}: unknown key {key!r}{hint}")
    missing = [name for name, each in known.items() if each.default is each.empty and name not in fields]
    if missing:
        raise RegistryError(f"{where}: {', '.join(missing)} is missing")
    return kind(**fields)


class _Plugins:
    """Installed plug-ins, looked for once in a process: that reads the metadata of every installed package.

    Attributes:
        failures: Of each that could not be loaded, why.
    """

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self._is_loaded = False

    def load(self) -> None:
        """Import every plug-in, unless that was done."""
        if self._is_loaded:
            return
        self._is_loaded = True
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINT_GROUP):
            try:
                point.load()
            except Exception as error:  # somebody else's module: whatever it raises must not stop ours
                self.failures[point.name] = f"{type(error).__name__}: {error}"
                warnings.warn(f"sphinxkit plug-in {point.name!r} failed to load: {error}", RuntimeWarning, stacklevel=4)


_plugins = _Plugins()


class Registry(Generic[T]):
    """The builders of one component family, by name.

    A builder is any callable with keyword arguments: a class or a function. ``package.module:builder`` names any
    importable builder without registration. Plug-ins are modules in the entry-point group ``sphinxkit.plugins`` that
    register builders when they are imported; they are loaded when a name is unknown or the names are listed.

    Args:
        family: What the components are, for messages: "encoder".
        builders: Builders that are registered at once.
    """

    def __init__(self, family: str, builders: Mapping[str, Callable[..., T]] | None = None) -> None:
        self.family = family
        self._builders: dict[str, Callable[..., T]] = dict(builders or {})
        self._imported: set[str] = set()

    def register(self, name: str) -> Callable[[B], B]:
        """Decorator that registers a builder.

        Args:
            name: Its name in recipes and ``create``.
        Raises:
            RegistryError: The name is already registered.
        """

        def decorator(builder: B) -> B:
            if name in self._builders:
                raise RegistryError(f"{self.family} {name!r} is already registered by {self._builders[name]!r}")
            self._builders[name] = builder
            return builder

        return decorator

    def names(self) -> list[str]:
        """Every registered name, plug-ins included, sorted."""
        _plugins.load()
        return sorted(self._builders)

    def get(self, name: str) -> Callable[..., T]:
        """The builder called ``name``, or the one at ``package.module:builder``.

        Args:
            name: Registered name or import path.
        Raises:
            RegistryError: There is none; the message lists the known names.
        """
        if not isinstance(name, str):
            raise RegistryError(f"the name of a {self.family} is text, got {name!r:.60}")
        if name in self._builders:
            return self._builders[name]
        if ":" in name:
            return self._import(name)
        known = self.names()
        if name in self._builders:
            return self._builders[name]
        failed = [f"{plugin} ({why})" for plugin, why in _plugins.failures.items()]
        raise RegistryError(
            f"unknown {self.family} {name!r}{suggest(name, known) or '.'} Known: {', '.join(known)}"
            + (f". Plug-ins that failed to load: {', '.join(failed)}" if failed else "")
        )

    def has_imported(self, path: str) -> bool:
        """Whether the builder at ``package.module:builder`` has been imported through this registry before."""
        return path in self._imported

    def _import(self, path: str) -> Callable[..., T]:
        if not _may_import.get() and path not in self._imported | _HARMLESS:
            raise RegistryError(
                f"{self.family} {path!r} is code to import; nothing of it was. If you trust where it comes from, pass "
                "trust=True"
            )
        module_name, _, attribute = path.partition(":")
        try:
            builder = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # somebody else's module: whatever it raises means that it cannot be used
            why = f"{type(error).__name__}: {error}"
            raise RegistryError(f"{self.family} {path!r} cannot be imported: {why}") from error
        if not callable(builder):
            raise RegistryError(f"{self.family} {path!r} is {type(builder).__name__}, not a callable")
        try:
            inspect.signature(builder)
        except ValueError as error:
            raise RegistryError(f"{self.family} {path!r} has no signature to check options against") from error
        self._imported.add(path)
        return typing.cast("Callable[..., T]", builder)

    def build(self, name: str, **options: Any) -> T:
        """Build the component ``name``.

        Args:
            name: Registered name or ``package.module:builder``.
            **options: Keyword arguments of the builder.
        Raises:
            RegistryError: Unknown name, unknown option or a missing required option.
        """
        builder = self.get(name)
        signature = inspect.signature(builder)
        try:
            signature.bind(**options)
        except TypeError as error:
            unknown = [option for option in options if option not in signature.parameters]
            hint = suggest(unknown[0], signature.parameters, options) if unknown else ""
            raise RegistryError(f"{self.family} {name!r}: {error}{hint or '.'} Signature: {signature}") from error
        return builder(**options)

    def options_model(self, name: str, wired: Collection[str] = ()) -> type[BaseModel]:
        """A pydantic model of the builder's keyword options, generated from its signature.

        Args:
            name: Registered name or ``package.module:builder``.
            wired: Parameters that the recipe's builder sets; they are left out, so a recipe that names one is an error.
        Raises:
            RegistryError: Unknown name.
        """
        from pydantic import ConfigDict, Field, create_model

        builder = self.get(name)
        target = builder.__init__ if inspect.isclass(builder) else builder
        try:
            hints = typing.get_type_hints(target)
        except NameError:  # names that exist for type checkers only; such options are taken as they come
            hints = {}
        factories = {
            field.name: field.default_factory
            for field in (dataclasses.fields(builder) if dataclasses.is_dataclass(builder) else ())
            if field.default_factory is not dataclasses.MISSING
        }
        fields: dict[str, Any] = {}
        extra: typing.Literal["allow", "forbid"] = "forbid"
        for parameter in inspect.signature(builder).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                extra = "allow"
            elif (
                parameter.kind is not inspect.Parameter.VAR_POSITIONAL
                and parameter.name not in wired
                and not parameter.name.startswith("_")  # private to the builder
            ):
                default = ... if parameter.default is inspect.Parameter.empty else parameter.default
                factory = factories.get(parameter.name)
                fields[parameter.name] = (
                    hints.get(parameter.name, Any),
                    default if factory is None else Field(default_factory=factory),
                )
        config = ConfigDict(extra=extra, arbitrary_types_allowed=True, protected_namespaces=())
        return create_model(f"{name}_options", __config__=config, **fields)
