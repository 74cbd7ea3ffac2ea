"""The tokenizer beside a checkpoint: found, and its size compared with the embedding's rows."""

from __future__ import annotations

from pathlib import Path

from sphinxkit.errors import CheckpointError

TOKENIZER_NAME = "tokenizer.model"


def tokenizer_size(model: Path | bytes) -> int:
    """Number of pieces in a SentencePiece model.

    Args:
        model: Its file, or the file's content.
    Raises:
        CheckpointError: It is not one.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        if isinstance(model, bytes):
            return int(SentencePieceProcessor(model_proto=model).get_piece_size())
        return int(SentencePieceProcessor(model_file=str(model)).get_piece_size())
    except (OSError, RuntimeError, ValueError) as error:
        where = "the tokenizer" if isinstance(model, bytes) else str(model)
        raise CheckpointError(f"{where}: not a SentencePiece model: {error}") from error


def find_tokenizer(folder: Path, rows: int | None, allow_more_rows: bool = False) -> Path | None:
    """The folder's ``tokenizer.model``, checked against the embedding.

    Args:
        folder: Where to look.
        rows: Rows of the embedding; None if the checkpoint has none.
        allow_more_rows: Whether the embedding may have rows that no piece uses (padded or extended vocabularies).
    Raises:
        CheckpointError: Not a tokenizer, or its size does not fit the embedding.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        return None
    if rows is not None:
        size = tokenizer_size(path)
        if size != rows and not (allow_more_rows and size < rows):
            raise CheckpointError(
                f"{path}: the tokenizer has {size} pieces but the embedding has {rows} rows; it is not the tokenizer "
                "this checkpoint was trained with: put the right one in its place"
            )
    return path
