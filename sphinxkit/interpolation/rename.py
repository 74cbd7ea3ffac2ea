"""Names of one model's tensors turned into those of another, by prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sphinxkit.errors import CheckpointError, RecipeError, list_errors
from sphinxkit.tensor_source import NamedSource, TensorSource

LLM_INTO_VLM = "llm_into_vlm"
"""Finds the place of a language model in a vision-language model from the names of both."""
_HEAD = "lm_head.weight"


def parse_rename(pairs: Iterable[str]) -> str | dict[str, str]:
    """``--rename`` as a plan has it: ``llm_into_vlm``, or prefixes written ``model.=language_model.model.``.

    Raises:
        RecipeError: A pair without ``=``.
    """
    texts = list(pairs)
    if texts == [LLM_INTO_VLM]:
        return LLM_INTO_VLM
    found = {}
    for text in texts:
        ours, equals, theirs = text.partition("=")
        if not equals:
            raise RecipeError(
                f"rename {text!r}: expected {LLM_INTO_VLM} or PREFIX=PREFIX, such as model.=language_model.model."
            )
        found[ours.strip()] = theirs.strip()
    return found


def renamed(source: TensorSource, prefixes: Mapping[str, str]) -> NamedSource:
    """A source whose names begin otherwise.

    Args:
        source: The source.
        prefixes: Prefix -> its replacement; of several that fit a name, the longest counts. Other names stay.
    Raises:
        CheckpointError: Two tensors would have one name.
        RecipeError: A prefix that no name begins with.
    """
    found: dict[str, tuple[TensorSource, str]] = {}
    used = set()
    for key in source.keys():  # noqa: SIM118
        prefix = max((each for each in prefixes if key.startswith(each)), key=len, default=None)
        used.add(prefix)
        name = key if prefix is None else prefixes[prefix] + key[len(prefix) :]
        if name in found:
            raise CheckpointError(f"rename: {found[name][1]!r} and {key!r} would both be {name!r}")
        found[name] = source, key
    idle = [prefix for prefix in prefixes if prefix not in used]
    if idle:
        raise RecipeError(f"rename: no tensor has a name that begins with {', '.join(map(repr, idle))}")
    return NamedSource(found)


def place_of_llm(llm: Iterable[str], vlm: Iterable[str]) -> dict[str, str]:
    """Prefixes that turn the names of a language model into those of its place in a vision-language model.

    Names alone decide: for each first word of the language model's names there must be one prefix under which the
    other model holds every name of that word, and there must be nothing in that place that the language model lacks.

    Raises:
        CheckpointError: There is no such place, or there are several.
    """
    words: dict[str, list[str]] = {}
    for name in llm:
        word, dot, rest = name.partition(".")
        words.setdefault(word + dot, []).append(rest)
    held = set(vlm)
    prefixes: dict[str, str] = {}
    for word, rests in words.items():
        ends = [f"{word}{rest}" for rest in rests] if len(rests) == 1 else rests  # "weight" alone would fit anywhere
        found = {
            name.removesuffix(ends[0])
            for name in held
            if name.endswith(ends[0]) and (name == ends[0] or name[: -len(ends[0])].endswith("."))
        }
        places = sorted(place for place in found if all(place + end in held for end in ends))
        if len(places) != 1:
            shown = f"at {', '.join(map(repr, places))}" if places else "no place for them under one prefix"
            raise CheckpointError(
                f"{LLM_INTO_VLM}: the language model's {word}* ({len(rests)} names) must have one place in the first "
                f"model, which has {shown}; say where they go: rename={{{word!r}: PREFIX}}"
            )
        prefixes[word] = places[0] + (word if len(rests) == 1 else "")
    filled = {prefixes[word] + rest for word, rests in words.items() for rest in rests}
    parts = {prefixes[word] + rest.partition(".")[0] for word, rests in words.items() for rest in rests}
    lost = [name for name in held - filled if any(f"{name}.".startswith(f"{part}.") for part in parts)]
    lost += [name for name in held - filled if f".{name}".endswith(f".{_HEAD}")]
    if lost:
        raise CheckpointError(
            list_errors(f"{LLM_INTO_VLM}: the language model lacks tensors of the first model's", sorted(set(lost)))
        )
    return prefixes
