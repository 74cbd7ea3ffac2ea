"""YAML from elsewhere: what it would unfold to is counted before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinxkit.errors import SphinxkitError

if TYPE_CHECKING:
    from yaml import SafeLoader

MAX_CHARACTERS = 100_000  # of a file: pure-Python YAML takes a second for them; our choice, as the next two
MAX_DEPTH = 40
MAX_NODES = 50_000  # with every alias written out


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file that is no larger than what it says.

    Args:
        path: Of the file.
    Raises:
        ValueError: The text is too long, nested too deep, or its aliases unfold to too much.
        OSError: The file cannot be read.
        yaml.YAMLError: It is not YAML.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_CHARACTERS + 1)
    check_yaml(text)
    return text


def check_yaml(text: str) -> None:
    """Refuse a text that is too long, nested too deep, or unfolds to too much.

    Raises:
        ValueError: It does; the message says where.
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS} characters")
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor and size so far of each list or mapping that is not closed
    total = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        anchor: str | None = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"line {line}: it is nested more than {MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in opened):
                raise ValueError(f"line {line}: *{anchor} stands inside of itself")
            size = sizes.get(str(anchor), 1)  # of an unknown anchor: the composer refuses it
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if opened:
            opened[-1] = (opened[-1][0], opened[-1][1] + size)
        total = max(total, size, opened[-1][1] if opened else 0)
        if total > MAX_NODES:
            raise ValueError(f"line {line}: with its aliases written out it has more than {MAX_NODES} entries")


def make_yaml(text: str, loader: type[SafeLoader] | None = None) -> Any:
    """The one document of a text that :func:`check_yaml` has passed.

    Args:
        text: YAML.
        loader: PyYAML's safe loader or one derived from it; None: the safe loader.
    Raises:
        yaml.YAMLError: There are several documents; or a value cannot be made, such as the 99th of a month or
            ``!!timestamp 9``, where PyYAML itself raises ValueError, AttributeError and others.
    """
    import yaml

    try:
        return yaml.load(text, loader or yaml.SafeLoader)  # noqa: S506 - each a safe loader
    except (yaml.YAMLError, SphinxkitError):
        raise
    except Exception as error:
        raise yaml.YAMLError(f"a value cannot be made: {error}") from error
