"""An opened checkpoint: lazily read tensors in canonical names, and what the files say about the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sphinxkit.checkpoint.entries import Entry, EntrySource
from sphinxkit.errors import CheckpointError

EMBEDDING = "llm.embed_tokens.weight"


class Checkpoint(EntrySource):
    """A checkpoint in any readable format; a :class:`~sphinxkit.tensor_source.TensorSource` and a context manager.

    Made by :func:`sphinxkit.checkpoint.open`. Nothing is read until it is asked for, and then from mapped files.

    Args:
        path: The folder.
        format: "sphinx" (released), "meta", "hf" or "sphinxkit".
        entries: Canonical name -> entry.
        files: The files that hold tensors.
        unused: Tensors that the files hold but no model uses, under their original names.
        recipe: The recipe (kind model) that the files describe; a string says why there is none.
        tokenizer_path: The tokenizer, if there is one.
        metadata: Whatever else the files say: ``config``, ``llama_type``, ``num_shards``.

    Attributes:
        path: The folder.
        format: As above.
        files: As above.
        unused: The unused group as a source of its own.
        tokenizer_path: As above.
        metadata: As above.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        entries: Mapping[str, Entry],
        files: Sequence[Path],
        unused: Mapping[str, Entry] | None = None,
        recipe: Mapping[str, Any] | str = "",
        tokenizer_path: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(entries, str(path))
        self.path = path
        self.format = format
        self.files = tuple(files)
        self.unused = EntrySource(unused or {}, f"{path} (unused group)")
        self.tokenizer_path = tokenizer_path
        self.metadata = dict(metadata or {})
        self._recipe = recipe

    @property
    def has_recipe(self) -> bool:
        """Whether the files say enough for ``recipe``."""
        return not isinstance(self._recipe, str)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as a plain dictionary, yours to change.

        Raises:
            CheckpointError: The files do not say enough; the message names what is missing.
        """
        if isinstance(self._recipe, str):
            raise CheckpointError(f"{self.path}: {self._recipe}")
        return copy.deepcopy(dict(self._recipe))

    def close(self) -> None:
        """Let go of the mapped files; tensors that were read stay valid."""
        super().close()
        self.unused.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def embedding_rows(entries: Mapping[str, Entry]) -> int | None:
    """Rows of the embedding, which is the vocabulary's size; None if there is no embedding."""
    return entries[EMBEDDING].shape[0] if EMBEDDING in entries else None
