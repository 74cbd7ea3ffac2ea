from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphinxkit.errors import DataError
from sphinxkit.generation import Decoder, Generation, Sampling, top_p_probs
from sphinxkit.llama import KVCache
from sphinxkit.tokenizer import Tokenizer

# Probabilities of some tens of tokens in float32 against float64
PROBS_ATOL = 1e-6


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


def test_top_p_equals_the_public_implementation(golden) -> None:
    import json

    from safetensors.torch import load_file

    for folder in ("llama_ens5", "llama_ens_light"):
        tensors = load_file(golden / folder / "golden.safetensors")
        fact = json.loads((golden / folder / "golden.json").read_text())["top_p"]
        probs, ids = top_p_probs(tensors["top_p.logits"], fact["temperature"], fact["top_p"])
        torch.testing.assert_close(probs, tensors["top_p.sorted_filtered_probs"], atol=PROBS_ATOL, rtol=0)
        assert (probs > 0).sum(-1).tolist() == fact["n_kept"]
        assert ids[:, 0].tolist() == tensors["top_p.logits"].argmax(-1).tolist()


def test_top_p_on_a_hand_worked_example() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    probs, ids = top_p_probs(logits, 1.0, 0.6)  # 0.5 before the second token: kept; 0.75 before the third: dropped
    assert ids[0].tolist() == [1, 2, 3, 0]
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]), atol=PROBS_ATOL, rtol=0)


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


def sample(tokenizer: Tokenizer, rows: int, seed: int | None, **options) -> list[list[int]]:
    llm = RandomLlm(tokenizer.vocab_size)
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=seed, **options)
    return [row.token_ids for row in Decoder(llm, tokenizer, [torch.zeros(2, 1)] * rows, sampling).run()]


def test_sampling_repeats_by_seed_and_a_row_does_not_depend_on_the_others(tokenizer: Tokenizer) -> None:
    three = sample(tokenizer, 3, seed=5)
    assert three == sample(tokenizer, 3, seed=5)
    assert three[:1] == sample(tokenizer, 1, seed=5)
    assert three[1:2] == sample(tokenizer, 1, seed=6)
    assert len({tuple(row) for row in three}) == 3
    assert sample(tokenizer, 1, seed=None) != sample(tokenizer, 1, seed=None)


def test_sampling_follows_the_distribution(tokenizer: Tokenizer) -> None:
    logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(3))
    probs, ids = top_p_probs(logits, 1.0, 0.5)
    kept = set(ids[0, probs[0] > 0].tolist())
    drawn = [token for row in sample(tokenizer, 50, seed=0, top_p=0.5) for token in row]
    assert set(drawn) <= kept
    expected = float(probs[0, 0])
    share = drawn.count(int(ids[0, 0])) / len(drawn)
    # four standard deviations of a binomial share
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(drawn)) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0 .* and finite; got inf"),
        ({"temperature": 10**400}, "temperature is beyond all floats"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens must be a whole number, got inf"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"stop": 5}, "stop must be a text or several, got 5"),
        ({"stop": ("a", 5)}, "stop must be a text or several"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Sampling(**options)


def test_numbers_of_neighbouring_types() -> None:
    import numpy as np

    found = Sampling(np.int64(2), temperature=1, top_p=np.float32(0.5), stop="x", seed=3.0)  # type: ignore[arg-type]
    assert found == Sampling(2, 1.0, 0.5, ("x",), 3)
    assert type(found.max_new_tokens) is type(found.seed) is int
    assert type(found.temperature) is type(found.top_p) is float


def test_a_prompt_without_room_for_an_answer(tokenizer: Tokenizer, decode) -> None:
    with pytest.raises(
        DataError, match="prompt 1 takes 100 positions and the answer needs at least 1, but the context holds 100"
    ):
        decode([[5], [5]], [3, 100])


def test_the_context_ends_an_answer(tokenizer: Tokenizer, decode) -> None:
    decoder, _ = decode([[5] * 50], [95], max_new_tokens=50)
    [answer] = decoder.run()
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")
