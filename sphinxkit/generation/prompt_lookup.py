"""Prompt lookup: draft the tokens that followed the same n-gram earlier in the text."""

from __future__ import annotations

from collections.abc import Iterable

NGRAM_SIZES = (3, 2)  # longest first; our choice: single tokens recur too often to foretell anything


class PromptLookup:
    """Drafts tokens for speculative decoding from the sequence's own text.

    The last three tokens (else the last two) are looked up earlier in the text; the tokens that followed there are the
    draft. A draft that reaches the end of the text wraps around, which suits repetitive text. A table of all n-gram
    positions keeps the cost per token constant.

    Args:
        token_ids: Token ids of the prompt's text.
    Source: Saxena, "Prompt Lookup Decoding", github.com/apoorvumang/prompt-lookup-decoding (2023); verification:
        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192.
    """

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Append the next token."""
        for size in NGRAM_SIZES:
            if len(self._ids) >= size:
                self._after[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """Draft at most ``limit`` tokens; none if the last n-gram has not occurred before.

        Args:
            limit: Longest draft.
        """
        for size in NGRAM_SIZES:
            start = self._after.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if start is not None and limit > 0:
                period = len(self._ids) - start
                return [self._ids[start + offset % period] for offset in range(limit)]
        return []
