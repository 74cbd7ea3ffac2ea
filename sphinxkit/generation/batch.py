"""Continuous batching: rows join and leave a running batch at any step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinxkit.errors import DataError
from sphinxkit.generation.cache_rows import copy_rows
from sphinxkit.generation.prefill import pass_cost, prefill_groups
from sphinxkit.generation.rows import Row
from sphinxkit.generation.sampling import Sampler
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.llama import KVCache, LlamaModel

# Passes between two waits for the device. A CPU does not run ahead, so waiting costs it nothing there, and passes for
# rows that are over would be lost. Elsewhere our choice: at most 7 passes are lost at a row's end, 1.4 % of the 512
# that an answer may have; not yet measured on CUDA.
CHUNK = {"cpu": 1}
CHUNK_ELSEWHERE = 8


class _PendingRequest:
    """A row whose prompt has not been read yet."""

    def __init__(self, row: Row, prompt: Tensor, start: int) -> None:
        self.row, self.prompt = row, prompt
        self.capacity = start + len(prompt) + row.budget


class ContinuousBatch:
    """Rows that are decoded together.

    A step either reads the prompts of the rows that wait, in passes of similar length, and chooses their first
    tokens; or gives every row a chunk of tokens (with drafts: what one pass confirms). It waits for the device once,
    for the chosen tokens; in a step that reads drafts of several rows a cache with static shapes waits once more.
    Within a chunk the device goes from token to token by itself; where a row ends, which its text decides, is found
    afterwards, and what was written behind that is dropped. A chunk is never longer than what any row may still write.

    A newcomer takes the place of a row that has finished. Where nobody takes it, the batch becomes smaller before the
    next pass (which waits once more), so that no work is done for rows that are over.

    Args:
        llm: The language model.
        cache: A cache of one row whose content the first row goes on from; None makes one that fits.
        capacity_multiple: The cache's capacity is rounded up to this many tokens, which saves copies where rows of all
            lengths come and go.
        chunk: Passes of a decoding step, at most; None: 1 on a CPU, 8 elsewhere.
    Raises:
        DataError: ``chunk`` is not positive.
    """

    def __init__(
        self,
        llm: LlamaModel,
        *,
        cache: KVCache | None = None,
        capacity_multiple: int = 1,
        chunk: int | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise DataError(f"chunk must be at least 1 pass, or None; got {chunk}")
        self._llm = llm
        self._chunk = chunk
        self._cache = cache
        self._continues = cache is not None
        self._multiple = capacity_multiple
        self._slots: list[Row | None] = [None] * (0 if cache is None else cache.batch_size)
        self._capacities: dict[Row, int] = {}
        self._waiting: list[_PendingRequest] = []
        self._tokens: Tensor | None = None  # the chosen tokens of the slots, while no row came or went

    def __len__(self) -> int:
        """Rows that have not finished, those that wait included."""
        return len(self._waiting) + len(self._capacities)

    def add(self, row: Row, prompt: Tensor, start: int = 0) -> None:
        """Let a row join at the next step.

        Args:
            row: Fresh.
            prompt: Its embedded prompt, image tokens included; behind ``start`` only.
            start: Tokens of the prompt that the given cache holds already.
        Shape:
            prompt: (S, D), S at least 1
        """
        self._waiting.append(_PendingRequest(row, prompt, start))

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Read the waiting prompts, or decode. Returns the rows that finished."""
        if self._waiting:
            newcomers, self._waiting = self._waiting, []
            rows = self._admit(newcomers)
        else:
            rows = [row for row in self._slots if row is not None]
            if rows and self._cache is not None:
                self._shrink(self._cache, len(rows))
                self._decode(self._cache, rows)
        finished = [row for row in rows if row.finish_reason is not None]
        for row in finished:
            self._slots[self._slots.index(row)] = None
            del self._capacities[row]
            self._tokens = None
        return finished

    # -- reading prompts ----------------------------------------------------------------------------------------------

    def _admit(self, newcomers: list[_PendingRequest]) -> list[Row]:
        """Read prompts; returns the rows, each with its first token."""
        cache = self._make_room(newcomers)
        places = [slot for slot, row in enumerate(self._slots) if row is None]
        lengths = [len(newcomer.prompt) for newcomer in newcomers]
        logits: list[Tensor] = []
        rows: list[Row] = []
        groups = prefill_groups(lengths, pass_cost(cache.device))
        for group in groups:
            in_place = len(group) == cache.batch_size
            prompts = [newcomers[index].prompt for index in group]
            target = cache if in_place else self._llm.make_cache(len(group), max(map(len, prompts)))
            logits.append(self._prefill(prompts, target))
            if not in_place:
                copy_rows(target, range(len(group)), cache, [places[index] for index in group], max(map(len, prompts)))
            for index in group:
                row = newcomers[index].row
                self._slots[places[index]] = row
                self._capacities[row] = newcomers[index].capacity
                rows.append(row)
                newcomers[index].prompt = torch.empty(0)  # lets go of the embeddings
        self._tokens = None
        chosen = Sampler(rows, 1, cache.device).choose(torch.cat(logits))
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.push(token)
        return rows

    def _prefill(self, prompts: list[Tensor], cache: KVCache) -> Tensor:
        """Read prompts into a cache that has a row for each; logits (B, V) of the next tokens."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        embeds = pad_sequence(prompts, batch_first=True)
        return self._llm.prefill(embeds, cache, lengths)[:, -1]

    def _make_room(self, newcomers: list[_PendingRequest]) -> KVCache:
        """A cache with exactly as many free rows as there are newcomers; the others keep theirs."""
        running = [slot for slot, row in enumerate(self._slots) if row is not None]
        num_rows = len(running) + len(newcomers)
        capacity = max([*self._capacities.values(), *(newcomer.capacity for newcomer in newcomers)])
        if self._cache is None or num_rows > self._cache.batch_size or capacity > self._cache.max_seq_len:
            multiple = self._multiple
            rounded = min((capacity + multiple - 1) // multiple * multiple, self._llm.max_seq_len)
            grown = self._llm.make_cache(num_rows, rounded)
            if self._cache is not None:
                held = int(self._cache.lengths.max()) if running else 0
                copy_rows(self._cache, running, grown, range(len(running)), held)
            self._slots = [*(self._slots[slot] for slot in running), *([None] * len(newcomers))]
            self._cache = grown
            return grown
        self._shrink(self._cache, num_rows)
        if not self._continues:
            self._cache.reset([slot for slot, row in enumerate(self._slots) if row is None] if running else None)
        self._continues = False
        return self._cache

    def _shrink(self, cache: KVCache, num_rows: int) -> None:
        """Cut the cache down to the running rows and as many free ones as make ``num_rows``."""
        surplus = cache.batch_size - num_rows
        if surplus:
            free = [slot for slot, row in enumerate(self._slots) if row is None][-surplus:]
            kept = [slot for slot in range(cache.batch_size) if slot not in free]
            cache.keep_rows(kept)
            self._slots = [self._slots[slot] for slot in kept]
            self._tokens = None

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _decode(self, cache: KVCache, rows: list[Row]) -> None:
        """A chunk of passes over all rows, which are the cache's."""
        drafts = [row.draft() for row in rows]
        if any(drafts):
            self._verify(cache, rows, drafts)
            return
        if self._tokens is None:
            self._tokens = to_device([row.written[-1] for row in rows], cache.device)
        num_passes = self._num_passes(cache, rows)
        choice = Sampler(rows, num_passes, cache.device)
        chosen = []
        for _ in range(num_passes):
            logits = self._llm.decode(self._tokens[:, None], cache)
            self._tokens = choice.choose(logits[:, -1])
            chosen.append(self._tokens)
        for row, tokens in zip(rows, torch.stack(chosen, dim=1).tolist(), strict=True):
            for token in tokens:
                if row.finish_reason is None:
                    row.push(token)

    def _num_passes(self, cache: KVCache, rows: list[Row]) -> int:
        """How long the next chunk is: no row may outgrow its budget, for which the cache has room."""
        if any(row.drafts for row in rows):
            return 1
        longest = CHUNK.get(cache.device.type, CHUNK_ELSEWHERE) if self._chunk is None else self._chunk
        return min(longest, *(row.num_left for row in rows))

    def _verify(self, cache: KVCache, rows: list[Row], drafts: list[list[int]]) -> None:
        """Read each row's last token and its draft in one pass, and keep what the model would have written."""
        counts = [1 + len(draft) for draft in drafts]
        width = max(counts)
        lines = [
            [row.written[-1], *draft, *[0] * (width - count)]
            for row, draft, count in zip(rows, drafts, counts, strict=True)
        ]
        tokens = to_device(lines, cache.device)
        are_full = min(counts) == width
        logits = self._llm(self._llm.embed(tokens), cache=cache, lengths=None if are_full else counts)
        chosen = logits.argmax(-1)
        # a row without a draft may be a sampled one
        chosen[:, 0] = Sampler(rows, 1, cache.device).choose(logits[:, 0])
        unread = []
        for row, draft, best in zip(rows, drafts, chosen.tolist(), strict=True):
            agreed = next((index for index, token in enumerate(draft) if token != best[index]), len(draft))
            unread.append(len(draft) - agreed)
            row.num_drafted += len(draft)
            for index, token in enumerate(best[: agreed + 1]):
                if row.finish_reason is None:
                    row.push(token)
                    row.num_accepted += index < agreed
        if any(unread):
            cache.lengths -= to_device(unread, cache.device)  # forget what was not confirmed
        self._tokens = None
