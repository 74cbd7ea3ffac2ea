"""An opened checkpoint: lazily read tensors under canonical names, and the model's description."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinxkit.checkpoint.keymap import KeyMap
from sphinxkit.checkpoint.verify import Verification, raise_damaged
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.checksums import Check, compare
from sphinxkit.tensor_files.lazy import LazySource, LazyTensor
from sphinxkit.tensor_files.low_rank import Update, UpdatedTensor


class Checkpoint(LazySource[LazyTensor]):
    """A checkpoint in any readable format; a :class:`~sphinxkit.tensor_source.TensorSource` and a context manager.

    Made by :func:`sphinxkit.checkpoint.open`. Nothing is read until it is asked for, and then from mapped files.

    Args:
        path: The folder.
        format: The format's name: "sphinx" (released), "meta", "hf" or "sphinxkit".
        tensors: Canonical name -> tensor.
        files: The files that hold tensors.
        unused: Tensors that the files hold but no model uses, under their original names.
        recipe: The recipe (kind model) that the files describe; a string says why there is none.
        tokenizer_path: The tokenizer, if there is one.
        metadata: Further facts from the files: ``config``, ``llama_type``, ``num_shards``.
        checks: Gives the checksums that the files carry.
        key_map: The names in the files; None if they are the canonical ones.
        errors: Errors in the tensors' names and shapes, if opening deferred them.
        updates: LoRA updates by the matrix's canonical name; those of matrices in ``tensors`` are merged, the others
            wait for :meth:`overlaid`.

    Attributes:
        path: The folder.
        format: As above.
        files: As above.
        unused: The unused group as a source of its own.
        tokenizer_path: As above.
        metadata: As above.
        errors: As above; :func:`sphinxkit.checkpoint.load_into` reports them with its own.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        tensors: Mapping[str, LazyTensor],
        files: Sequence[Path],
        unused: Mapping[str, LazyTensor] | None = None,
        recipe: Mapping[str, Any] | str = "",
        tokenizer_path: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
        checks: Callable[[], Sequence[Check]] = list,
        key_map: KeyMap | None = None,
        errors: Sequence[str] = (),
        updates: Mapping[str, Update] | None = None,
    ) -> None:
        super().__init__(_updated(tensors, updates or {}), str(path))
        self._updates = {name: update for name, update in (updates or {}).items() if name not in tensors}
        self.path = path
        self.format = format
        self.files = tuple(files)
        self.unused = LazySource[LazyTensor](unused or {}, f"{path} (unused group)")
        self.tokenizer_path = tokenizer_path
        self.metadata = dict(metadata or {})
        self.errors = tuple(errors)
        self._recipe = recipe
        self._checks = checks
        self._key_map = key_map
        self._verification: Verification | None = None

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
            raise_errors(f"{self.path}: {self._recipe}; and", self.errors)
            raise CheckpointError(f"{self.path}: {self._recipe}")
        return copy.deepcopy(dict(self._recipe))

    def name_in_files(self, key: str) -> str:
        """The name that the files have, or would have, for the canonical ``key``."""
        found = None if self._key_map is None else self._key_map.to_theirs(key)
        return key if found is None else found[0]

    def overlaid(self, tuned: Checkpoint) -> Checkpoint:
        """This checkpoint with the tensors of a tuned one, which may hold a part of them, in their place.

        Args:
            tuned: Opened; its tokenizer counts, if it has one.
        Returns:
            Both as one; it closes the files of both.
        Raises:
            CheckpointError: The two hold no tensor in common, or shapes differ.
        """
        shapes = {key: tuned.shape(key) for key in tuned.keys()}  # noqa: SIM118 - a TensorSource is no mapping
        shapes |= {key: update.shape for key, update in tuned._updates.items()}
        common = [key for key in shapes if key in self._tensors]
        if not common:
            raise CheckpointError(f"{tuned.path}: holds no tensor that {self.path} has; it is not tuned from it")
        raise_errors(
            f"{tuned.path}: does not lie over {self.path}",
            [
                f"{key!r} is {list(shapes[key])}, there {list(self.shape(key))}"
                for key in common
                if shapes[key] != self.shape(key)
            ],
        )
        return Checkpoint(
            self.path,
            self.format,
            {**self._tensors, **tuned._tensors},
            [*self.files, *tuned.files],
            {**self.unused._tensors, **tuned.unused._tensors},
            self._recipe if self.has_recipe else tuned._recipe,
            tuned.tokenizer_path or self.tokenizer_path,
            self.metadata,
            lambda: [*self._checks(), *tuned._checks()],
            self._key_map,
            (*self.errors, *tuned.errors),
            {**self._updates, **tuned._updates},
        )

    def verify(self) -> None:
        """Compare every checksum that the files carry, now; reads everything once.

        Raises:
            CheckpointError: Every file or record that does not match.
        """
        raise_damaged(str(self.path), compare(self._checks()))

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Compare every checksum in a second thread while the block reads the tensors.

        Raises:
            CheckpointError: At the end of the block: every file or record that does not match.
        """
        with Verification(str(self.path), self._checks) as verification:
            self._verification = verification
            try:
                yield
            finally:
                self._verification = None

    def _count(self, key: str) -> None:
        if self._verification is not None:
            self._verification.copied(self._tensor(key).stored_bytes)

    def read(self, key: str) -> Tensor:
        """As :meth:`LazySource.read`."""
        self._count(key)
        return super().read(key)

    def read_into(self, key: str, out: Tensor) -> None:
        """As :meth:`LazySource.read_into`.

        Shape:
            out: ``shape(key)``
        """
        self._count(key)
        super().read_into(key, out)

    def close(self) -> None:
        """Close the mapped files; tensors already read stay valid."""
        super().close()
        self.unused.close()


def _updated(tensors: Mapping[str, LazyTensor], updates: Mapping[str, Update]) -> dict[str, LazyTensor]:
    return {
        name: UpdatedTensor(tensor, updates[name]) if name in updates else tensor for name, tensor in tensors.items()
    }
