"""Folders of models that this library does not know, mixed by the names that their files have."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from sphinxkit.checkpoint import Checkpoint
from sphinxkit.checkpoint.formats.tensor_folder import NAME, config_differences
from sphinxkit.errors import CheckpointError, list_errors
from sphinxkit.interpolation.rename import LLM_INTO_VLM, place_of_llm, renamed
from sphinxkit.interpolation.rules import Rule
from sphinxkit.recipe.open_checkpoints import everything
from sphinxkit.tensor_files.tokenizer_files import read_tokenizer_files, tokens_by_id
from sphinxkit.tensor_source import TensorSource

_logger = logging.getLogger(__name__)


def renamed_sources(
    rename: str | Mapping[str, str] | None, opened: Sequence[Checkpoint], llm_only: bool = False
) -> list[TensorSource]:
    """Everything that each checkpoint holds, all but the first under the names that ``rename`` gives.

    Args:
        rename: As in a mix plan.
        opened: The first gives the names.
        llm_only: Language models alone.
    Raises:
        CheckpointError: A language model has no place in the first.
        RecipeError: A prefix that no name begins with.
    """
    first, *others = [everything(each, llm_only) for each in opened]
    if rename is None:
        return [first, *others]
    return [
        first,
        *(
            renamed(other, place_of_llm(other.keys(), first.keys()) if isinstance(rename, str) else rename)
            for other in others
        ),
    ]


def vocabulary_rules(sources: Sequence[TensorSource]) -> list[Rule]:
    """Rules that mix the rows that all have, and keep the first one's others: for tensors that differ in rows alone."""
    first, *others = sources
    held = [set(other.keys()) for other in others]
    return [
        Rule(key, "overlap")
        for key in first.keys()  # noqa: SIM118
        if all(key in names for names in held)
        and any(
            other.shape(key) != first.shape(key) and other.shape(key)[1:] == first.shape(key)[1:] for other in others
        )
    ]


def check_folders(rename: str | Mapping[str, str] | None, opened: Sequence[Checkpoint], tokenizer: str | None) -> None:
    """Compare what lies beside the tensors of folders: vocabularies, and what the configurations say.

    Args:
        rename: As in a mix plan.
        opened: The first one's files are those of the result.
        tokenizer: Named by the user, who answers for it then; None for none.
    Raises:
        CheckpointError: An id stands for different tokens in two models.
    """
    first, *others = opened
    for other in others:
        differences = config_differences(first, other, is_renamed=rename == LLM_INTO_VLM)
        if differences:
            _logger.warning(
                list_errors(f"the result has the configuration of {first.path}; {other.path} differs", differences)
            )
    if tokenizer is not None:
        return
    vocabularies = [
        None if each.tokenizer_path is None else tokens_by_id(read_tokenizer_files(each.tokenizer_path))
        for each in opened
    ]
    for other, theirs in zip(others, vocabularies[1:], strict=True):
        ours = vocabularies[0]
        if ours is None or theirs is None:
            continue
        wrong = [index for index, token in theirs.items() if ours.get(index, token) != token]
        if wrong:
            raise CheckpointError(
                f"the tokenizers differ: id {wrong[0]} is {ours[wrong[0]]!r} in {first.path} and {theirs[wrong[0]]!r} "
                f"in {other.path} ({len(wrong)} ids in all); name the one to keep: tokenizer=PATH"
            )


def check_is_by_name(opened: Sequence[Checkpoint], llm_only: bool, layout: str | None) -> bool:
    """Whether folders are mixed by their files' own names; then nothing may be asked for that needs other names.

    Raises:
        CheckpointError: ``llm_only``, or another format for the result.
    """
    if opened[0].format != NAME:
        return False
    if llm_only:
        raise CheckpointError(
            "llm_only=True needs models that this library knows; these are mixed by their files' own names: "
            "say in rules which tensors are kept or dropped"
        )
    if layout not in (None, NAME):
        raise CheckpointError(f"format {layout!r}: tensors under their files' own names are written as {NAME!r} only")
    return True
