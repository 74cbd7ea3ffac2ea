"""Continuous batching: sequences join and leave a running batch at any step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinxkit.errors import DataError
from sphinxkit.generation.context import answer_length
from sphinxkit.generation.prefill import pass_cost, prefill_groups
from sphinxkit.generation.sampling import Sampler, Sampling, TokenChoices
from sphinxkit.generation.sequence import GeneratedSequence
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.llama import KVCache, LlamaModel
    from sphinxkit.tokenizer import Tokenizer

# Decoding passes between two waits for the device. A CPU does not run ahead, so waiting costs it nothing, and passes
# for sequences that have ended would be lost. Elsewhere our choice: at most 7 passes are lost at a sequence's end, 1.4
# % of the 512 that an answer may have; not yet measured on CUDA.
PASSES_PER_STEP = {"cpu": 1}
PASSES_PER_STEP_ELSEWHERE = 8


@dataclasses.dataclass(slots=True)
class _PendingRequest:
    """A sequence whose prompt has not been read yet.

    Args:
        sequence: The new sequence, without generated tokens.
        prompt: Embeddings after the cached positions.
        num_cached: Positions of the prompt already in the batch's cache.
        capacity: Maximum length of prompt and answer together.
    """

    sequence: GeneratedSequence
    prompt: Tensor
    num_cached: int
    capacity: int


class ContinuousBatch:
    """Batch of sequences that are decoded together.

    A step either prefills or decodes. Prefill reads the pending prompts, grouped by length, and chooses their first
    tokens. Decoding gives every sequence up to ``passes_per_step`` tokens (with drafts: the tokens that one pass
    confirms). Each step synchronises with the device once, for the chosen tokens; drafts of several sequences with a
    static cache need a second synchronisation. In between, the device runs from token to token without the host. The
    end of a sequence is found afterwards from its text, and tokens generated after the end are dropped.

    A new sequence takes the slot of a finished one. Without new sequences the batch shrinks before the next pass (one
    more synchronisation), so finished sequences cost no work.

    Args:
        llm: The language model.
        tokenizer: Turns tokens into text; ids beyond it are not generated.
        end_ids: Token ids that end an answer, in addition to end-of-sentence.
        cache: One-row cache whose content the first sequence may continue. None: allocate a cache.
        capacity_multiple: Round the cache's capacity up to a multiple of this many tokens, which saves copies when
            sequence lengths vary.
        passes_per_step: Maximum forward passes per decoding step; None: 1 on a CPU, 8 elsewhere.
    Raises:
        DataError: ``passes_per_step`` is not positive.
    """

    def __init__(
        self,
        llm: LlamaModel,
        tokenizer: Tokenizer,
        *,
        end_ids: Sequence[int] = (),
        cache: KVCache | None = None,
        capacity_multiple: int = 1,
        passes_per_step: int | None = None,
    ) -> None:
        if passes_per_step is not None and passes_per_step < 1:
            raise DataError(f"passes_per_step must be at least 1, or None; got {passes_per_step}")
        self._llm = llm
        self._tokenizer = tokenizer
        self._end_ids = tuple(end_ids)
        self._choices = TokenChoices(tokenizer.vocab_size, end_ids)
        self._passes_per_step = passes_per_step
        self.cache = cache
        """Keys and values of the running sequences; None before the first step."""
        self._multiple = capacity_multiple
        self._slots: list[GeneratedSequence | None] = [None] * (0 if cache is None else cache.batch_size)
        self._capacities: dict[GeneratedSequence, int] = {}
        self._pending: list[_PendingRequest] = []
        self._last_tokens: Tensor | None = None  # each slot's last token, as long as no sequence came or went

    def __len__(self) -> int:
        """Number of unfinished sequences, pending ones included."""
        return len(self._pending) + len(self._capacities)

    def add(
        self,
        prompt: Tensor,
        sampling: Sampling,
        *,
        prompt_ids: Sequence[int] = (),
        num_draft_tokens: int | None = None,
        num_cached: int = 0,
        name: str = "the prompt",
    ) -> GeneratedSequence:
        """Add a sequence; it joins the batch at the next step.

        Args:
            prompt: Embeddings of the prompt after the cached positions, image tokens included.
            sampling: Sampling options; ``max_new_tokens`` is reduced to what fits in the context.
            prompt_ids: Token ids of the prompt's text, searched for drafts.
            num_draft_tokens: Maximum draft length of prompt lookup; None: no drafts.
            num_cached: Positions of the prompt in the given cache, which must hold nothing else.
            name: Name of the prompt in error messages.
        Shape:
            prompt: (S, D), S at least 1
        Raises:
            DataError: The prompt leaves no room for an answer, drafts are not possible, or a sequence that continues a
                cache is not alone.
        """
        is_continued = bool(self._pending and self._pending[0].num_cached)
        if is_continued or (num_cached and (self.cache is None or len(self))):
            raise DataError("continuous batch: a prompt that continues a cache must be alone, in a batch with a cache")
        num_positions = num_cached + len(prompt)
        length = answer_length(name, num_positions, sampling.max_new_tokens, self._llm.max_seq_len)
        sequence = GeneratedSequence(
            self._tokenizer,
            dataclasses.replace(sampling, max_new_tokens=length),
            prompt_ids=prompt_ids,
            num_draft_tokens=num_draft_tokens,
            end_ids=self._end_ids,
        )
        self._pending.append(_PendingRequest(sequence, prompt, num_cached, num_positions + length))
        return sequence

    @torch.no_grad()
    def step(self) -> list[GeneratedSequence]:
        """Read the pending prompts, or decode. Returns the sequences that finished."""
        if self._pending:
            pending, self._pending = self._pending, []
            sequences = self._admit(pending)
        else:
            sequences = [sequence for sequence in self._slots if sequence is not None]
            if sequences and self.cache is not None:
                self._shrink(self.cache, len(sequences))
                self._decode(self.cache, sequences)
        finished = [sequence for sequence in sequences if sequence.finish_reason is not None]
        for sequence in finished:
            slot = self._slots.index(sequence)
            if sequence.finish_reason == "error" and self.cache is not None:
                self.cache.erase(slot)
            self._slots[slot] = None
            del self._capacities[sequence]
            self._last_tokens = None
        return finished

    # -- reading prompts ----------------------------------------------------------------------------------------------

    def _admit(self, pending: list[_PendingRequest]) -> list[GeneratedSequence]:
        """Read prompts; returns the sequences, each with its first token."""
        cache = self._make_room(pending)
        free = [slot for slot, sequence in enumerate(self._slots) if sequence is None]
        lengths = [len(request.prompt) for request in pending]
        logits: list[Tensor] = []
        sequences: list[GeneratedSequence] = []
        for group in prefill_groups(lengths, pass_cost(cache.device)):
            in_place = len(group) == cache.batch_size
            prompts = [pending[index].prompt for index in group]
            longest = max(map(len, prompts))
            target = cache if in_place else self._llm.make_cache(len(group), longest)
            logits.append(self._prefill(prompts, target))
            if not in_place:
                _copy_rows(target, range(len(group)), cache, [free[index] for index in group], longest)
            for index in group:
                sequence = pending[index].sequence
                self._slots[free[index]] = sequence
                self._capacities[sequence] = pending[index].capacity
                sequences.append(sequence)
                pending[index].prompt = torch.empty(0)  # lets go of the embeddings
        self._last_tokens = None
        of_all = torch.cat(logits)
        chosen = Sampler(sequences, 1, cache.device, self._choices).choose(of_all)
        for sequence, (token, log_prob) in zip(
            sequences, self._choices.with_log_probs(of_all, chosen).tolist(), strict=True
        ):
            sequence.append(int(token), log_prob)
        return sequences

    def _prefill(self, prompts: list[Tensor], cache: KVCache) -> Tensor:
        """Read prompts into a cache that has a row for each; logits (B, V) of the next tokens."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        embeds = pad_sequence(prompts, batch_first=True)
        return self._llm.prefill(embeds, cache, lengths)[:, -1]

    def _make_room(self, pending: list[_PendingRequest]) -> KVCache:
        """A cache with exactly as many free rows as there are pending requests; running sequences keep theirs."""
        running = [slot for slot, sequence in enumerate(self._slots) if sequence is not None]
        continued = pending[0].num_cached  # of the given cache's only row, by the first sequence
        num_rows = len(running) + len(pending)
        capacity = max([*self._capacities.values(), *(request.capacity for request in pending)])
        cache = self.cache
        if cache is None or num_rows > cache.batch_size or capacity > cache.max_seq_len:
            multiple = self._multiple
            rounded = min((capacity + multiple - 1) // multiple * multiple, self._llm.max_seq_len)
            grown = self._llm.make_cache(num_rows, rounded)
            if cache is not None and continued:
                _copy_rows(cache, [0], grown, [0], continued)
            elif cache is not None and running:
                num_held = int(cache.lengths[to_device(running, cache.device)].max())
                _copy_rows(cache, running, grown, range(len(running)), num_held)
            self._slots = [*(self._slots[slot] for slot in running), *([None] * len(pending))]
            self.cache = cache = grown
        else:
            self._shrink(cache, num_rows)
            if not continued:
                cache.reset(
                    [slot for slot, sequence in enumerate(self._slots) if sequence is None] if running else None
                )
        return cache

    def _shrink(self, cache: KVCache, num_rows: int) -> None:
        """Cut the cache down to the running sequences and as many free rows as make ``num_rows``."""
        surplus = cache.batch_size - num_rows
        if surplus:
            free = [slot for slot, sequence in enumerate(self._slots) if sequence is None][-surplus:]
            kept = [slot for slot in range(cache.batch_size) if slot not in free]
            cache.keep_rows(kept)
            self._slots = [self._slots[slot] for slot in kept]
            self._last_tokens = None

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _decode(self, cache: KVCache, sequences: list[GeneratedSequence]) -> None:
        """Some passes over all sequences, which are the cache's rows."""
        drafts = [sequence.draft() for sequence in sequences]
        if any(drafts):
            self._verify(cache, sequences, drafts)
            return
        if self._last_tokens is None:
            self._last_tokens = to_device([sequence.generated_ids[-1] for sequence in sequences], cache.device)
        num_passes = self._num_passes(cache, sequences)
        sampler = Sampler(sequences, num_passes, cache.device, self._choices)
        chosen = []
        for _ in range(num_passes):
            tokens = self._last_tokens[:, None].clamp(min=0)  # a sequence that failed reads anything
            logits = self._llm.decode(tokens, cache)
            self._last_tokens = sampler.choose(logits[:, -1])
            chosen.append(self._choices.with_log_probs(logits[:, -1], self._last_tokens))
        for sequence, tokens in zip(sequences, torch.stack(chosen, dim=1).tolist(), strict=True):
            for token, log_prob in tokens:
                if sequence.finish_reason is None:
                    sequence.append(int(token), log_prob)

    def _num_passes(self, cache: KVCache, sequences: list[GeneratedSequence]) -> int:
        """Passes of the next step: no sequence may outgrow its ``max_new_tokens``, for which the cache has room."""
        if any(sequence.is_drafting for sequence in sequences):
            return 1
        most = self._passes_per_step or PASSES_PER_STEP.get(cache.device.type, PASSES_PER_STEP_ELSEWHERE)
        return min(most, *(sequence.num_remaining for sequence in sequences))

    def _verify(self, cache: KVCache, sequences: list[GeneratedSequence], drafts: list[list[int]]) -> None:
        """Read each sequence's last token and its draft in one pass; keep what the model would have written."""
        counts = [1 + len(draft) for draft in drafts]
        width = max(counts)
        lines = [
            [sequence.generated_ids[-1], *draft, *[0] * (width - count)]
            for sequence, draft, count in zip(sequences, drafts, counts, strict=True)
        ]
        tokens = to_device(lines, cache.device)
        are_full = min(counts) == width
        logits = self._llm.prefill(self._llm.embed(tokens), cache, None if are_full else counts, all_positions=True)
        chosen = self._choices.most_likely(logits)
        # a sequence without a draft may be a sampled one
        chosen[:, 0] = Sampler(sequences, 1, cache.device, self._choices).choose(logits[:, 0])
        unread = []
        told = self._choices.with_log_probs(logits, chosen).tolist()
        for sequence, draft, best in zip(sequences, drafts, told, strict=True):
            agreed = next((index for index, token in enumerate(draft) if token != best[index][0]), len(draft))
            unread.append(len(draft) - agreed)
            sequence.num_drafted += len(draft)
            for index, (token, log_prob) in enumerate(best[: agreed + 1]):
                if sequence.finish_reason is None:
                    sequence.append(int(token), log_prob)
                    sequence.num_accepted += index < agreed
        if any(unread):
            cache.lengths -= to_device(unread, cache.device)  # forget what was not confirmed
        self._last_tokens = None


def _copy_rows(source: KVCache, rows: Sequence[int], target: KVCache, places: Sequence[int], num_tokens: int) -> None:
    """Copy the first ``num_tokens`` positions of some rows to places in another cache; no row holds more."""
    given = to_device(rows, source.device)
    wanted = to_device(places, target.device)
    for ours, theirs in zip((*target.keys, *target.values), (*source.keys, *source.values), strict=True):
        ours[wanted, :, :num_tokens] = theirs[given, :, :num_tokens].to(ours.dtype)
    target.lengths[wanted] = source.lengths[given]
    target.lengths_changed()
