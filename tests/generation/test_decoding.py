from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation import Decoder, GeneratedSequence, Generation, Sampling, TokenChoices, top_p_probs
from sphinxkit.llama import KVCache
from sphinxkit.tokenizer import Tokenizer


def test_eos_ends_a_row_and_is_not_part_of_it(tokenizer: Tokenizer, decode) -> None:
    ids = tokenizer.encode("It is blue.")
    decoder, _ = decode([ids])
    assert decoder.run() == [Generation("It is blue.", ids, "eos")]


def test_max_new_tokens_holds_for_each_row(tokenizer: Tokenizer, decode) -> None:
    long, short = tokenizer.encode("There is a red square on a grey background."), tokenizer.encode("It is")
    decoder, _ = decode([long, short], [2, 9], max_new_tokens=4)
    first, second = decoder.run()
    assert (first.token_ids, first.finish_reason) == (long[:4], "length")
    assert (second.token_ids, second.finish_reason) == (short, "eos")


def test_a_finished_row_leaves_the_batch(tokenizer: Tokenizer, decode) -> None:
    scripts = [tokenizer.encode(text) for text in ("It", "There is a red square.", "It is")]
    decoder, llm = decode(scripts)
    assert [row.token_ids for row in decoder.run()] == scripts
    assert llm.passes[:3] == [(3, 3), (3, 1), (3, 1)]
    assert llm.passes[-1] == (1, 1)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("It is blue.\n### Human: more", "\n###", "It is blue."),
        ("one two three", " two", "one"),
        ("one two three", "wo th", "one t"),  # begins and ends inside tokens
        ("aaab", "aab", "a"),
    ],
)
def test_stop_strings_are_found_in_the_text(tokenizer: Tokenizer, decode, text: str, stop: str, expected: str) -> None:
    decoder, _ = decode([tokenizer.encode(text)], stop=(stop,))
    [answer] = decoder.run()
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    assert expected.startswith(tokenizer.decode(answer.token_ids))


def test_the_first_of_several_stop_strings_wins(tokenizer: Tokenizer, decode) -> None:
    decoder, _ = decode([tokenizer.encode("a b c d")], stop=(" d", " c", " b c"))
    assert decoder.run()[0].text == "a"


def test_streaming_holds_back_what_may_become_a_stop_string(tokenizer: Tokenizer, decode) -> None:
    text = "ab\n##x and \n### Human"
    decoder, _ = decode([tokenizer.encode(text)], stop=("\n###",))
    pieces = list(decoder.stream())
    assert "".join(pieces) == "ab\n##x and "
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(shown.endswith("\n###"[:size]) for size in range(1, 4)) or shown + "x" in text


def test_streaming_never_shows_half_a_character(tokenizer: Tokenizer, decode) -> None:
    text = "Café 你好 😀!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # bytes
    decoder, _ = decode([ids])
    pieces = list(decoder.stream())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Tokenizer, decode) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    decoder, _ = decode([ids])
    pieces = list(decoder.stream())
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1].startswith("\ufffd")


class RandomLlm:
    """The same fixed distribution at every step; the cache is only counted."""

    def __init__(self, vocab_size: int) -> None:
        self.logits = torch.randn(1, 1, vocab_size, generator=torch.Generator().manual_seed(3))
        self.max_seq_len = 100

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        return KVCache(1, batch_size, max_seq_len, 1, 1)

    def embed(self, token_ids: Tensor) -> Tensor:
        return token_ids[..., None].float()

    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        return self(self.embed(token_ids), cache=cache)

    def prefill(self, embeds: Tensor, cache: KVCache, lengths: Tensor) -> Tensor:
        return self(embeds, cache=cache, lengths=lengths, output_positions=lengths - 1)

    def __call__(self, embeds: Tensor, *, cache: KVCache, lengths=None, output_positions=None) -> Tensor:
        return self.logits.expand(len(embeds), -1, -1)


def sample(tokenizer: Tokenizer, *seeds: int | None, **options) -> list[list[int]]:
    llm = RandomLlm(tokenizer.vocab_size)
    sampling = [Sampling(max_new_tokens=20, temperature=1.0, seed=seed, **options) for seed in seeds]
    decoder = Decoder(llm, tokenizer, [torch.zeros(2, 1)] * len(seeds), sampling)
    return [generation.token_ids for generation in decoder.run()]


def test_sampling_repeats_by_seed_and_does_not_depend_on_the_other_prompts(tokenizer: Tokenizer) -> None:
    three = sample(tokenizer, 5, 6, 7)
    assert three == sample(tokenizer, 5, 6, 7)
    assert three[::-1] == sample(tokenizer, 7, 6, 5)
    assert three[1:2] == sample(tokenizer, 6)
    assert len({tuple(row) for row in three}) == 3
    assert sample(tokenizer, None) != sample(tokenizer, None)
    one = sample(tokenizer, None, None)
    assert one[0] != one[1]


def test_the_host_programs_defaults_do_not_change_the_draws(tokenizer: Tokenizer) -> None:
    expected = sample(tokenizer, 5, 6)
    torch.set_default_dtype(torch.bfloat16)
    try:
        sequence = GeneratedSequence(tokenizer, Sampling(temperature=1.0, seed=5))
        assert sequence.draw().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert sample(tokenizer, 5, 6) == expected


def test_sampling_follows_the_distribution(tokenizer: Tokenizer) -> None:
    logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(3))
    probs, ids = top_p_probs(logits, 1.0, 0.5)
    kept = set(ids[0, probs[0] > 0].tolist())
    drawn = [token for row in sample(tokenizer, *range(50), top_p=0.5) for token in row]
    assert set(drawn) <= kept
    expected = float(probs[0, 0])
    share = drawn.count(int(ids[0, 0])) / len(drawn)
    # four standard deviations of a binomial share
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(drawn)) ** 0.5


def test_a_prompt_without_room_for_an_answer(tokenizer: Tokenizer, decode) -> None:
    with pytest.raises(
        DataError, match="prompt 1 takes 100 positions and the answer needs at least 1, but the context holds 100"
    ):
        decode([[5], [5]], [3, 100])


def test_the_context_ends_an_answer(tokenizer: Tokenizer, decode) -> None:
    decoder, _ = decode([[5] * 50], [95], max_new_tokens=50)
    [answer] = decoder.run()
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")


NAN = float("nan")


def spoilt(scripted, scripts: list[list[int]], vocab_size: int, value: float, begin: int):
    """A scripted model whose logits are spoilt from a given position of the second script on."""

    class Spoilt(scripted):
        def choose(self, script: int, position: int) -> Tensor:
            logits = super().choose(script, position)
            if script == 1 and position >= begin:
                logits[7] = value
            return logits

    return Spoilt(scripts, vocab_size)


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "seed": 1}, {"passes_per_step": 3}, {"num_draft_tokens": 2}],
    ids=["greedy", "sampled", "several passes", "drafts"],
)
def test_logits_that_are_not_finite_end_their_own_sequence(
    tokenizer: Tokenizer, scripted, value: float, position: int, options: dict
) -> None:
    scripts = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("one two", "ab ab ab ab ab", "It is")]
    llm = spoilt(scripted, scripts, tokenizer.vocab_size, value, position)
    own = {name: options[name] for name in options.keys() & {"temperature", "seed"}}
    rest = {name: options[name] for name in options.keys() - own.keys()}
    prompts = [torch.full((3, 1), float(script)) for script in range(3)]
    decoder = Decoder(llm, tokenizer, prompts, Sampling(**own), **rest)
    while not decoder.is_done:
        decoder.step()
    first, second, third = decoder.sequences
    assert (first.result().text, third.result().text) == ("one two", "It is")
    assert second.finish_reason == "error"
    assert second.token_ids == scripts[1][:position]
    with pytest.raises(DataError, match=f"after {position} generated tokens: the logits are not finite .*dtype"):
        second.result()
    with pytest.raises(DataError, match="not finite"):
        Decoder(llm, tokenizer, prompts, Sampling(**own), **rest).run()
    with pytest.raises(DataError, match="not finite"):
        list(Decoder(llm, tokenizer, prompts[1:2], Sampling(**own), **rest).stream())


@pytest.mark.parametrize("options", [{}, {"temperature": 1e-3, "seed": 1}, {"num_draft_tokens": 2}])
def test_rows_beyond_the_tokenizer_are_not_chosen(tokenizer: Tokenizer, scripted, options: dict) -> None:
    class SecondBest(scripted):
        """Likes the last row best, and the script second best."""

        def choose(self, script: int, position: int) -> Tensor:
            logits = super().choose(script, position)
            logits[-1] = 20.0
            return logits

    script = tokenizer.encode("ab ab ab ab")
    llm = SecondBest([[*script, tokenizer.eos_id]], tokenizer.vocab_size + 5)
    own = {name: value for name, value in options.items() if name != "num_draft_tokens"}
    prompts, drafts = [torch.zeros(3, 1)], options.get("num_draft_tokens")
    decoder = Decoder(llm, tokenizer, prompts, Sampling(**own), num_draft_tokens=drafts)
    assert decoder.run() == [Generation("ab ab ab ab", script, "eos")]
    # an id that ends an answer is chosen wherever it lies
    end = tokenizer.vocab_size + 4
    decoder = Decoder(llm, tokenizer, prompts, Sampling(**own), num_draft_tokens=drafts, end_ids=[end])
    assert decoder.run() == [Generation("", [], "eos")]
    wide = torch.zeros(tokenizer.vocab_size + 5)
    restricted = TokenChoices(tokenizer.vocab_size, [end]).restrict(wide)
    assert restricted.isinf().nonzero().flatten().tolist() == list(range(tokenizer.vocab_size, end))
    assert TokenChoices(tokenizer.vocab_size, [2]).restrict(wide).shape == (tokenizer.vocab_size,)


def test_every_end_id_ends_an_answer(tokenizer: Tokenizer, scripted) -> None:
    script = tokenizer.encode("red green blue")
    llm = scripted([script], tokenizer.vocab_size)
    [answer] = Decoder(llm, tokenizer, [torch.zeros(3, 1)], Sampling(), end_ids=script[2:3]).run()
    assert answer == Generation(tokenizer.decode(script[:2]), script[:2], "eos")
