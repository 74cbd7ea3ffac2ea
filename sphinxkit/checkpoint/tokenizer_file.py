"""The tokenizer beside a checkpoint: found, and its size compared with the embedding's rows."""

from __future__ import annotations

import logging
from pathlib import Path

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.tokenizer_files import (
    JSON_NAME,
    SENTENCEPIECE_NAME,
    TIKTOKEN,
    added_beside,
    choose_tokenizer,
    read_tokenizer_files,
    tokenizer_size,
)

_logger = logging.getLogger(__name__)


def find_tokenizer(
    folder: Path, rows: int | None, allow_more_rows: bool = False, *, may_lie_above: bool = False
) -> Path | None:
    """The folder's tokenizer, checked against the embedding; what cannot be used is named in the log and left out.

    Args:
        folder: Where to look.
        rows: Rows of the embedding; None if the checkpoint has none.
        allow_more_rows: Whether the embedding may have rows that no piece uses (padded or extended vocabularies); of a
            ``tokenizer.json`` it always may.
        may_lie_above: Whether the folder above is looked at where ``folder`` has none. A tokenizer that does not fit
            there is another model's.
    Raises:
        CheckpointError: Not a tokenizer, or its size does not fit the embedding.
    """
    path = choose_tokenizer(folder)
    if path is None:
        if (folder / SENTENCEPIECE_NAME).is_file():
            _logger.warning("%s %s; the model has no tokenizer", folder / SENTENCEPIECE_NAME, TIKTOKEN)
        return _above(folder, rows, allow_more_rows) if may_lie_above and rows is not None else None
    if rows is not None:
        size = tokenizer_size(read_tokenizer_files(path), path)
        if size != rows and not ((allow_more_rows or path.name == JSON_NAME) and size < rows):
            raise CheckpointError(
                f"{path}: the tokenizer has {size} pieces but the embedding has {rows} rows; it is not the tokenizer "
                "this checkpoint was trained with: put the right one in its place"
            )
        if path.name == SENTENCEPIECE_NAME and size < rows and (added := added_beside(folder, size)):
            _logger.warning(
                "%s does not have the added tokens %s, which are read letter by letter; put the model's %s beside it",
                path,
                ", ".join(added[:5]) + ", ..." * (len(added) > 5),
                JSON_NAME,
            )
    return path


def _above(folder: Path, rows: int, allow_more_rows: bool) -> Path | None:
    """The tokenizer one folder up, where Meta's and LLaMA2-Accessory's downloads have it, if it fits."""
    try:
        found = find_tokenizer(folder.resolve().parent, rows, allow_more_rows)
    except CheckpointError as error:
        _logger.warning("the tokenizer above %s is not used: %s", folder, error)
        return None
    if found is not None:
        _logger.info("%s has no tokenizer; using %s", folder, found)
    return found
