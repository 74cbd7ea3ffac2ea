from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sphinxkit import formatters
from sphinxkit.data.collate import Example, ExampleMaker, collate_packed, collate_padded, split_text
from sphinxkit.data.conversations import OverLengthError
from sphinxkit.data.samples import Sample
from sphinxkit.errors import DataError
from sphinxkit.tilers import preprocess
from sphinxkit.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "recipes" / "sphinx_micro.model"


@pytest.fixture
def examples() -> list[Example]:
    pixels = torch.arange(12.0).view(3, 2, 2)
    return [
        Example("a", [1, 5, 6], [-100, 5, 6]),
        Example("b", [1, 7], [-100, 7], pixels),
        Example("c", [1, 8, 9, 10], [1, -100, 9, 10], pixels + 1),
    ]


def test_packed(examples: list[Example]) -> None:
    batch = collate_packed(examples)
    assert batch.token_ids.tolist() == [[1, 5, 6, 1, 7, 1, 8, 9, 10]]
    assert batch.labels.tolist() == [[-100, 5, 6, -100, 7, 1, -100, 9, 10]]
    assert batch.seq_lens == (3, 2, 4)
    assert batch.image_rows == (1, 2)
    assert torch.equal(batch.pixels, torch.stack([examples[1].pixels, examples[2].pixels]))
    assert (batch.ids, batch.num_text_tokens, batch.num_images) == (("a", "b", "c"), 9, 2)
    assert batch.num_learnt == 5  # c's first token is labelled, but continues nothing
    assert [example.length(10) for example in examples] == [3, 12, 14]


def test_padded(examples: list[Example]) -> None:
    batch = collate_padded(examples, pad_id=3)
    assert batch.token_ids.tolist() == [[1, 5, 6, 3], [1, 7, 3, 3], [1, 8, 9, 10]]
    assert batch.labels.tolist() == [[-100, 5, 6, -100], [-100, 7, -100, -100], [1, -100, 9, 10]]
    assert (batch.seq_lens, batch.image_rows, batch.num_text_tokens, batch.num_learnt) == (None, (1, 2), 9, 5)
    assert collate_padded(examples[:1]).pixels is None
    moved = batch.to(torch.device("meta"))
    assert moved.token_ids.is_meta
    assert moved.pixels.is_meta


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_nothing_to_collate(collate) -> None:
    with pytest.raises(DataError, match="there are no samples"):
        collate([])


@pytest.fixture
def maker() -> ExampleMaker:
    return ExampleMaker(formatters.create("sphinx_v1"), Tokenizer(TOKENIZER), 28, 200, 7)


def text(content: str) -> Sample:
    return Sample("t:0", "", (), content, None, "t.jsonl:1")


def captioned(image: Path) -> Sample:
    messages = ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"})
    return Sample("c:0", "", messages, "", image, "c.jsonl:1")


def test_samples_become_examples(maker: ExampleMaker, tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 30), (10, 200, 30))
    picture.save(tmp_path / "cat.png")
    made = maker(captioned(tmp_path / "cat.png"))
    encoded = maker.template.encode(captioned(tmp_path / "cat.png").messages, maker.tokenizer)
    assert (made.id, made.token_ids, made.labels) == ("c:0", encoded.token_ids, encoded.labels)
    assert torch.equal(made.pixels, preprocess([picture], 28)[0])
    plain = maker(text("hello"))
    assert plain.labels == [-100, *plain.token_ids[1:]]
    assert plain.pixels is None


def test_faults_name_the_sample(maker: ExampleMaker, tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"sample c:0: .*bad.png"):
        maker(captioned(tmp_path / "bad.png"))
    with pytest.raises(DataError, match="sample c:0: it has an image, but the model has no vision tower"):
        replace(maker, image_size=0)(captioned(tmp_path / "bad.png"))
    with pytest.raises(DataError, match="an image takes 7 of the 8 tokens of a row; nothing is left for text"):
        replace(maker, max_tokens=8)(captioned(tmp_path / "bad.png"))
    with pytest.raises(DataError, match=r"sample t:0: \d+ tokens, at most 200 are allowed"):
        maker(text("word " * 300))
    with pytest.raises(OverLengthError, match="sample t:0"):
        replace(maker, over_length="skip")(text("word " * 300))
    cut = replace(maker, over_length="truncate")(text("word " * 300))
    assert (len(cut.token_ids), cut.is_truncated) == (200, True)


def test_long_texts_continue_and_every_token_is_predicted_once() -> None:
    tokenizer, template = Tokenizer(TOKENIZER), formatters.create("sphinx_v1")
    maker = ExampleMaker(template, tokenizer, 0, 10, 0, "continue")
    text = " ".join(f"word {number}" for number in range(30))
    ids = tokenizer.encode(text, bos=True, eos=True)
    made = maker(Sample("a", "", (), text, None, "f:1"))
    assert isinstance(made, list)
    assert made[0].token_ids + [token for example in made[1:] for token in example.token_ids[1:]] == ids
    assert all(2 <= len(example.token_ids) <= 10 for example in made)
    assert sum(collate_packed([example]).num_learnt for example in made) == len(ids) - 1
    assert isinstance(maker(Sample("b", "", (), "word", None, "f:2")), Example)  # short ones are left alone
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": text})
    cut = ExampleMaker(template, tokenizer, 0, 200, 0, "continue")(Sample("c", "", turns, "", None, "f:3"))
    assert isinstance(cut, Example)
    assert cut.is_truncated
    assert len(cut.token_ids) == 200


@pytest.mark.parametrize(("count", "wanted"), [(2, [2]), (10, [10]), (11, [10, 2]), (19, [10, 10]), (20, [10, 10, 2])])
def test_lengths_of_pieces(count: int, wanted: list[int]) -> None:
    ids = list(range(count))
    assert [len(example.token_ids) for example in split_text("a", ids, ids, 10)] == wanted
