from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.errors import DataError
from sphinxkit.generation import GeneratedSequence, PromptLookup, Sampling


@pytest.mark.parametrize(
    ("ids", "limit", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 9, 2, 3], 3, [4, 9, 2]),  # two tokens will do
        ([1, 2, 8, 1, 2, 9, 1, 2], 1, [9]),  # the latest
        ([7, 1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], 1, [8]),  # three tokens before two
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # goes round
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2, 1, 2], 0, []),
        ([5], 3, []),
        ([], 3, []),
    ],
)
def test_drafts(ids: list[int], limit: int, expected: list[int]) -> None:
    assert PromptLookup(ids).draft(limit) == expected


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6))
def test_the_table_finds_what_a_search_finds(ids: list[int], limit: int) -> None:
    expected: list[int] = []
    for size in (3, 2):
        starts = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
        if len(ids) > size and starts:
            line = list(ids)
            for _ in range(limit):
                line.append(line[len(line) - (len(ids) - starts[-1])])
            expected = line[len(ids) :]
            break
    assert PromptLookup(ids).draft(limit) == expected


def test_answers_are_the_same_in_fewer_passes(tokenizer, decode) -> None:
    text = "The red square is in the box. The blue square is in the box. The green square is in the box."
    texts = [text, "no repetition whatsoever here", "ab ab ab ab ab ab ab ab"]
    scripts = [tokenizer.encode(each) for each in texts]
    plain, slow = decode(scripts, [3, 9, 5])
    expected = plain.run()
    drafted, fast = decode(scripts, [3, 9, 5], num_draft_tokens=5, token_ids=[scripts[0][:8], [5], [6]])
    answers = drafted.run()
    assert answers == expected
    assert [answer.text for answer in answers] == texts
    assert len(fast.passes) < len(slow.passes)
    assert 0 < answers[0].num_accepted <= answers[0].num_drafted
    assert expected[0].num_drafted == answers[1].num_accepted == 0


def test_no_draft_goes_beyond_what_may_be_written(tokenizer, decode) -> None:
    script = tokenizer.encode("ab ab ab ab ab ab ab ab ab ab")
    for num_new in range(1, len(script)):
        decoder, _ = decode([script, script], [3, 4], max_new_tokens=num_new, num_draft_tokens=4)
        for answer in decoder.run():
            assert (answer.token_ids, answer.finish_reason) == (script[:num_new], "length")
            assert answer.num_accepted <= num_new
    decoder, _ = decode([script], [95], num_draft_tokens=4)  # the context of 100 ends it
    assert decoder.run()[0].token_ids == script[:5]


def test_a_stop_string_within_a_draft(tokenizer, decode) -> None:
    script = tokenizer.encode("ab cd ab cd ab cd ab STOP cd ab cd")
    for stop in ("ab STOP", " cd ab cd ab"):
        plain, _ = decode([script], stop=(stop,))
        drafted, _ = decode([script], stop=(stop,), num_draft_tokens=6)
        [answer] = drafted.run()
        assert [answer] == plain.run()
        assert answer.finish_reason == "stop"


def test_streaming_with_drafts(tokenizer, decode) -> None:
    text = "ab ab ab ab ab ab ab\n### x"
    decoder, _ = decode([tokenizer.encode(text)], stop=("\n###",), num_draft_tokens=4)
    assert "".join(decoder.stream()) == "ab ab ab ab ab ab ab"


def test_errors(tokenizer) -> None:
    with pytest.raises(DataError, match="num_draft_tokens must be at least 1 token, or None; got 0"):
        GeneratedSequence(tokenizer, Sampling(), num_draft_tokens=0)
    with pytest.raises(DataError, match="num_draft_tokens must be at least 1 token, or None; got '3'"):
        GeneratedSequence(tokenizer, Sampling(), num_draft_tokens="3")
    with pytest.raises(DataError, match="num_draft_tokens is for greedy decoding, but temperature is 0.5"):
        GeneratedSequence(tokenizer, Sampling(temperature=0.5), num_draft_tokens=2)
