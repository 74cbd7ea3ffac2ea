"""What a text model's files and their configuration say of each other, gathered into one error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import Entry
from sphinxkit.checkpoint.keymap import KeyMap
from sphinxkit.checkpoint.llm_config import llm_faults, llm_shapes
from sphinxkit.checkpoint.reader import EMBEDDING
from sphinxkit.checkpoint.sharding import UNFIT
from sphinxkit.checkpoint.tokenizer_file import TOKENIZER_NAME, tokenizer_size
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.lazy import LazySource


@dataclass
class Fitting:
    """Collects what does not fit while a folder is opened.

    Attributes:
        folder: For messages.
        key_map: The files' names.
        faults: What was found so far.
    """

    folder: Path
    key_map: KeyMap
    faults: list[str] = field(default_factory=list)

    def vocab_size(self, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> int | None:
        """Rows of the embedding; where it is missing, what the configuration or else the tokenizer says."""
        if EMBEDDING in entries:
            return entries[EMBEDDING].shape[0]
        stated = config.get("vocab_size")
        if isinstance(stated, int) and stated > 0:
            return stated
        path = self.folder / TOKENIZER_NAME
        return tokenizer_size(path) if path.is_file() else None

    def missing(self, llm: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str]:
        """The language model's tensors that are not there, one line each."""
        return [
            f"{key!r} ({found[0]!r} in the files) is missing"
            for key in llm_shapes(llm)
            if key not in entries and (found := self.key_map.to_theirs(key))
        ]

    def no_embedding(self, llm: Mapping[str, Any], entries: Mapping[str, Entry]) -> str:
        """Says that neither the embedding nor anything else tells the vocabulary's size; notes what else is missing.

        Args:
            llm: The recipe's ``llm`` part but for that size.
            entries: Under canonical names.
        """
        self.faults += self.missing(llm, entries)
        found = self.key_map.to_theirs(EMBEDDING)
        return f"there is no embedding ({EMBEDDING!r}, {found[0] if found else EMBEDDING!r} in the files)"

    def compare(self, llm: Mapping[str, Any], entries: Mapping[str, Entry], config_path: Path, defer: bool) -> None:
        """Compare the language model's tensors with its numbers.

        Args:
            llm: The recipe's ``llm`` part.
            entries: Under canonical names.
            config_path: Where the numbers are from.
            defer: Whether somebody else raises ``faults``.
        Raises:
            CheckpointError: Everything that does not fit, what was collected before too.
        """
        shapes = llm_faults(llm, LazySource(entries, str(self.folder)), config_path)
        named = bool(self.faults)
        self.faults += shapes
        if self.faults and not defer:
            self.faults += self.missing(llm, entries)
            unfit = f"{config_path} and the tensors beside it do not fit together"
            raise_errors(f"{self.folder}: {UNFIT}" if named else unfit, self.faults)

    def raise_all(self) -> None:
        """Raise what was collected.

        Raises:
            CheckpointError: There is something.
        """
        raise_errors(f"{self.folder}: {UNFIT}", self.faults)


def count_llama_shards(shape: tuple[int, ...], found: int) -> int:
    """How many shards a checkpoint has, told by one slice of a query projection.

    Args:
        shape: (D / shards, D).
        found: How many there are, the answer where the shape does not tell.
    """
    if len(shape) != 2 or not shape[0] or shape[1] % shape[0]:
        return found
    return shape[1] // shape[0]


def check_shard_count(folder: Path, shape: tuple[int, ...], found: int, name: str) -> None:
    """Refuse a folder without its last shards, which the numbers in the files' names do not tell.

    Args:
        folder: For messages.
        shape: Of one slice of a query projection.
        found: How many shards there are.
        name: Template of their names.
    Raises:
        CheckpointError: There should be more; the message names them.
    """
    count = count_llama_shards(shape, found)
    if count > found:
        missing = ", ".join(name.format(rank) for rank in range(found, count))
        raise CheckpointError(f"{folder}: holds {found} of {count} shards; missing {missing}; fetch them")
