"""What one sequence keeps of the tokens that it is given."""

from __future__ import annotations

import pytest

from sphinxkit.generation import GeneratedSequence, Sampling


@pytest.mark.parametrize("num_kept", [1, 2])
def test_a_stop_string_that_begins_where_a_token_ends_keeps_that_token(tokenizer, num_kept: int) -> None:
    ids = tokenizer.encode("red green blue")[:4]
    texts = [tokenizer.decode(ids[: end + 1]) for end in range(len(ids))]
    stop = texts[num_kept][len(texts[num_kept - 1]) :]
    sequence = GeneratedSequence(tokenizer, Sampling(max_new_tokens=9, stop=(stop,)))
    for token in ids[: num_kept + 1]:
        sequence.append(token, 0.0)
    result = sequence.result()
    assert result.finish_reason == "stop"
    assert result.token_ids == ids[:num_kept]
    assert result.text.strip() == texts[num_kept - 1].strip()
