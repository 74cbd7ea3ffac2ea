"""The context-length rule: text, image tokens and new tokens together fit into the model's context."""

from __future__ import annotations

from sphinxkit.errors import DataError

MIN_TRUNCATED_TOKENS = 16  # text tokens, the first included, that truncating always leaves; our choice


def check_context(
    what: str, num_positions: int, max_seq_len: int, *, num_new_tokens: int = 0, num_image_tokens: int = 0
) -> None:
    """Raise if a text, its image tokens and the new tokens do not fit into the context.

    Args:
        what: Names the text in the message ("prompt 0").
        num_positions: Number of text and image tokens together.
        max_seq_len: The model's context length.
        num_new_tokens: Positions to reserve for new tokens.
        num_image_tokens: Number of image tokens among the positions.
    Raises:
        DataError: They do not fit; the message names every number.
    """
    if num_positions + num_new_tokens > max_seq_len:
        images = f", {num_image_tokens} of them image tokens" if num_image_tokens else ""
        answer = f" and the answer needs at least {num_new_tokens}" if num_new_tokens else ""
        raise DataError(f"{what} takes {num_positions} positions{images}{answer}, but the context holds {max_seq_len}")


def answer_length(
    what: str, num_positions: int, max_new_tokens: int, max_seq_len: int, *, num_image_tokens: int = 0
) -> int:
    """Maximum length of an answer: ``max_new_tokens``, or the rest of the context if that is less.

    Args:
        what: See ``check_context``.
        num_positions: Length of the prompt, image tokens included.
        max_new_tokens: Requested maximum.
        max_seq_len: The model's context length.
        num_image_tokens: Number of image tokens among the positions.
    Raises:
        DataError: The prompt leaves no position for an answer.
    """
    check_context(what, num_positions, max_seq_len, num_new_tokens=1, num_image_tokens=num_image_tokens)
    return min(max_new_tokens, max_seq_len - num_positions)


def truncate_left(
    what: str, token_ids: list[int], max_new_tokens: int, max_seq_len: int, *, num_image_tokens: int = 0
) -> list[int]:
    """Drop tokens after the first until text, image tokens and ``max_new_tokens`` fit into the context.

    Texts of up to ``MIN_TRUNCATED_TOKENS`` tokens stay as they are.

    Args:
        what: See ``check_context``.
        token_ids: The text, beginning-of-sentence first.
        max_new_tokens: Tokens to reserve for the answer.
        max_seq_len: The model's context length.
        num_image_tokens: Number of image tokens in the prompt.
    Raises:
        DataError: Fewer than ``MIN_TRUNCATED_TOKENS`` tokens would remain.
    """
    room = max_seq_len - num_image_tokens - max_new_tokens
    if len(token_ids) <= max(room, MIN_TRUNCATED_TOKENS):
        return token_ids
    if room < MIN_TRUNCATED_TOKENS:
        raise DataError(
            f"{what} has {len(token_ids)} tokens, and max_new_tokens {max_new_tokens} with {num_image_tokens} image "
            f"tokens leaves {max(room, 0)} of the context of {max_seq_len} for them; truncating keeps at least "
            f"{MIN_TRUNCATED_TOKENS}: ask for fewer new tokens"
        )
    return token_ids[:1] + token_ids[len(token_ids) - room + 1 :]
