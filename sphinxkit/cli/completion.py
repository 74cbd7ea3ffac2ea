"""Values that a shell completes: names of this installation; where none fits, the shell completes files."""

from __future__ import annotations

from collections.abc import Callable

from sphinxkit.hub import NANO

Complete = Callable[[str], list[str]]


def complete_names(*kinds: str, more: tuple[str, ...] = ()) -> Complete:
    """What Typer calls with the word before the cursor.

    Args:
        kinds: Kinds of ``sphinxkit.list_names``.
        more: Further words.
    """

    def complete(incomplete: str) -> list[str]:
        from sphinxkit.evaluation.names import list_names

        names = {*more, *(name for kind in kinds for name in list_names(kind))}
        return sorted(name for name in names if name.startswith(incomplete))

    return complete


complete_checkpoint = complete_names(more=(NANO,))
complete_recipe = complete_names("recipes")
complete_model = complete_names("recipes", more=(NANO,))


def complete_kind(incomplete: str) -> list[str]:
    """What ``sphinxkit list`` lists."""
    from sphinxkit.evaluation.names import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]
