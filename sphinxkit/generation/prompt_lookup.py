"""Prompt lookup: guess what comes next by what followed the same words before."""

from __future__ import annotations

from collections.abc import Iterable

NGRAM_SIZES = (3, 2)  # longest first; our choice: single tokens recur too often to foretell anything


class PromptLookup:
    """Drafts tokens for speculative decoding from the sequence's own text.

    Where the last three tokens (else the last two) have stood before, what followed them is the draft; if that runs
    into the end of the text, it goes round, as a text that repeats itself does. A token costs the same work at any
    length: the places of all n-grams are kept in a table.

    Args:
        token_ids: The prompt's text.
    Source: Saxena, "Prompt Lookup Decoding", github.com/apoorvumang/prompt-lookup-decoding (2023); verification:
        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192.
    """

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Take the next token."""
        for size in NGRAM_SIZES:
            if len(self._ids) >= size:
                self._after[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may come next; none if the end of the text is new.

        Args:
            limit: Longest draft.
        """
        for size in NGRAM_SIZES:
            start = self._after.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if start is not None and limit > 0:
                period = len(self._ids) - start
                return [self._ids[start + offset % period] for offset in range(limit)]
        return []
