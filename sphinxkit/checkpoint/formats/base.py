"""Base class and registry of checkpoint formats; each format is one class in one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.llm_config import full_numbers, refuse_incomplete, refuse_options
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import Replicas
from sphinxkit.checkpoint.tokenizer_file import find_tokenizer
from sphinxkit.checkpoint.writing import TensorInput, Texts, WriteOptions
from sphinxkit.errors import CheckpointError
from sphinxkit.registry import Registry


@dataclass(frozen=True)
class OpenOptions:
    """Options of :func:`sphinxkit.checkpoint.open`; see there."""

    replicas: Replicas = "equal"
    llama_type: str | None = None
    is_delta: bool = False
    defer_errors: bool = False


class Format(ABC):
    """A layout of checkpoint folders. Registered with ``registry.register(name)``; has no state.

    Attributes:
        name: Its registered name.
        looks_like: Its characteristic files, for messages.
        is_text_only: Whether it holds only a language model.
        has_shards: Whether it can be written in tensor-parallel shards.
        has_unused: Whether it can carry the unused group of released files.
        has_deltas: Whether it can hold differences to a base model.
        has_options: Whether it holds language models with more options than LLaMA 2 has.
        is_canonical: Whether its tensors are those of a model here, under canonical names once opened.
        may_pad_vocabulary: Whether the embedding may have more rows than the tokenizer has pieces.
        tokenizer_may_lie_above: Whether the tokenizer may lie one folder up.
    """

    name: str
    looks_like: str
    is_text_only: bool = False
    has_shards: bool = False
    has_unused: bool = False
    has_deltas: bool = False
    has_options: bool = False
    is_canonical: bool = True
    may_pad_vocabulary: bool = False
    tokenizer_may_lie_above: bool = False

    @abstractmethod
    def detect(self, folder: Path) -> bool:
        """Whether a folder holds a checkpoint in this format.

        Raises:
            CheckpointError: It does, but files are missing or an index is damaged.
        """

    def detect_delta(self, folder: Path) -> bool:
        """Whether a folder holds differences to a base model in this format; False for formats that have none."""
        del folder
        return False

    @abstractmethod
    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a folder; tensors are read lazily under canonical names.

        Raises:
            CheckpointError: Damaged, missing or contradicting files, names or shapes that do not fit.
        """

    @abstractmethod
    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write the tensors into an empty folder, one at a time.

        Args:
            folder: Existing folder.
            source: Tensors to save.
            unused: The unused group; None for formats without ``has_unused``.
            options: Write options.
        Returns:
            The small text files that go beside the tensors.
        Raises:
            CheckpointError: The format cannot hold these tensors or lacks a number it needs.
        """

    def tokenizer(self, folder: Path, rows: int | None) -> Path | None:
        """The tokenizer of a folder, if there is one.

        Args:
            folder: Where to look.
            rows: Rows of the embedding; None if there is none.
        Raises:
            CheckpointError: It cannot be read, or its size does not fit the embedding.
        """
        above = self.tokenizer_may_lie_above
        return find_tokenizer(folder, rows, allow_more_rows=self.may_pad_vocabulary, may_lie_above=above)

    def numbers(self, source: TensorInput, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
        """The language model's numbers, for formats that write them beside the tensors.

        Raises:
            CheckpointError: There is no recipe, or numbers are missing.
        """
        if recipe is None or "llm" not in recipe:
            raise CheckpointError(f"format {self.name!r} writes the model's numbers beside it; pass recipe=")
        numbers = full_numbers(recipe["llm"], source)
        refuse_incomplete(recipe["llm"], numbers, source)
        if not self.has_options:
            refuse_options(numbers, self.name)
        return numbers


registry: Registry[Format] = Registry("checkpoint format")
register = registry.register
names = registry.names


def get_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        CheckpointError: There is none; the message lists the known ones.
    """
    known = registry.names()
    if name not in known:
        raise CheckpointError(f"unknown checkpoint format {name!r}; known: {', '.join(known)}")
    return registry.build(name)
