from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sphinxkit.generation import Decoder, Sampling
from sphinxkit.llama import KVCache
from sphinxkit.tokenizer import Tokenizer


class ScriptedLlm:
    """Stands in for a language model: a row whose prompt is embedded as i writes script i, whatever it reads.

    The cache is a real one: keys hold the script's number, values the length of the prompt, so a row that is moved
    wrongly writes something else.
    """

    def __init__(self, scripts: Sequence[list[int]], vocab_size: int, max_seq_len: int = 100) -> None:
        self.scripts = scripts
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.passes: list[tuple[int, int]] = []
        self.num_prompt_tokens = 0

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        assert max_seq_len <= self.max_seq_len
        return KVCache(1, batch_size, max_seq_len, 1, 1)

    def embed(self, token_ids: Tensor) -> Tensor:
        return token_ids[..., None].float()

    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        return self(self.embed(token_ids), cache=cache)

    def prefill(self, embeds: Tensor, cache: KVCache, lengths: Tensor | None, *, all_positions: bool = False) -> Tensor:
        positions = None if all_positions or lengths is None else lengths - 1
        return self(embeds, cache=cache, lengths=lengths, output_positions=positions)

    def choose(self, script: int, position: int) -> Tensor:
        logits = torch.zeros(self.vocab_size)
        line = self.scripts[script]
        logits[line[min(position, len(line) - 1)]] = 10.0
        return logits

    def __call__(self, embeds: Tensor, *, cache: KVCache, lengths=None, output_positions=None) -> Tensor:
        batch_size, width = embeds.shape[:2]
        self.passes.append((batch_size, width))
        step = cache.prepare_write(width, lengths)
        is_prompt = output_positions is not None
        starts = cache.lengths.tolist()
        if is_prompt:
            self.num_prompt_tokens += batch_size * width
            keys = embeds[:, :1, :, None].expand(-1, width, -1, -1)
            counts = torch.as_tensor(lengths)
            values = counts[:, None, None, None].expand(-1, width, -1, -1).float()
        else:
            keys, values = (
                x[0][:, :, :1].transpose(1, 2).expand(-1, width, -1, -1) for x in (cache.keys, cache.values)
            )
        cache.write(0, keys.clone(), values.clone(), step)
        cache.advance(step)
        columns = 1 if is_prompt else width
        logits = torch.zeros(batch_size, columns, self.vocab_size)
        for row in range(batch_size):
            script, prompt = int(cache.keys[0][row, 0, 0, 0]), int(cache.values[0][row, 0, 0, 0])
            for column in range(columns):
                position = 0 if is_prompt else starts[row] + column + 1 - prompt
                logits[row, column] = self.choose(script, position)
        return logits


@pytest.fixture(scope="session")
def tokenizer(golden) -> Tokenizer:
    return Tokenizer(golden / "llama_ens" / "tokenizer.model")


@pytest.fixture
def decode(tokenizer: Tokenizer) -> Callable[..., tuple[Decoder, ScriptedLlm]]:
    """A decoder over scripts, and the stand-in that plays them."""

    def build(scripts: list[list[int]], prompt_lengths: list[int] | None = None, **options):
        llm = ScriptedLlm([[*script, tokenizer.eos_id] for script in scripts], tokenizer.vocab_size)
        lengths = prompt_lengths or [3] * len(scripts)
        prompts = [torch.full((length, 1), float(script)) for script, length in enumerate(lengths)]
        own = {name: options.pop(name) for name in ("num_draft_tokens", "token_ids") if name in options}
        return Decoder(llm, tokenizer, prompts, Sampling(**options), **own), llm

    return build


@pytest.fixture
def scripted() -> type[ScriptedLlm]:
    return ScriptedLlm
