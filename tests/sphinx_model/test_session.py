from __future__ import annotations

from pathlib import Path

import pytest

from sphinxkit.errors import DataError
from sphinxkit.sphinx_model import SphinxModel

QUESTIONS = ("What is in the image?", "Where is it, and why?", "And which colour does the thing in the middle have?")
NUM_SLOTS = 291  # visual tokens of one image of this model


@pytest.mark.parametrize("num_draft_tokens", [None, 4])
@pytest.mark.parametrize("with_image", [True, False])
def test_answers_are_those_of_chat(model: SphinxModel, images, with_image: bool, num_draft_tokens: int | None) -> None:
    image = images[0] if with_image else None
    session = model.session(image, num_draft_tokens=num_draft_tokens)
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        expected = model.chat(messages, image, max_new_tokens=10)
        assert session.ask(question, max_new_tokens=10) == expected
        messages.append({"role": "assistant", "content": expected})
        assert session.messages == messages


def test_a_further_question_costs_its_own_tokens(model: SphinxModel, images, calls) -> None:
    session = model.session(images[0])
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert calls.num_views == 1
    read, answer = 0, ""
    for turn, question in enumerate(QUESTIONS):
        prompt, _ = model.chat_prompt([*session.messages, {"role": "user", "content": question}])
        held = tokenizer.encode(prompt, bos=True)
        before = calls.num_prompt_tokens
        session.ask(question, max_new_tokens=6)
        fresh = calls.num_prompt_tokens - before
        assert session.num_prefilled == (read := read + fresh)
        if turn == 0:
            assert fresh == len(held) + NUM_SLOTS
        else:  # the words, the template, and at most the last answer: a random model spells in a way of its own
            added = answer + "\n### Human: " + question + "\n### Assistant:"
            assert 0 < fresh <= len(tokenizer.encode(added)) + 4
        answer = session.messages[-1]["content"]
    assert calls.num_views == 1
    assert session.num_reused > 2 * NUM_SLOTS


def test_reset_keeps_the_image_read(model: SphinxModel, images, calls) -> None:
    session = model.session(images[1])
    session.ask(QUESTIONS[0], max_new_tokens=4)
    session.ask(QUESTIONS[1], max_new_tokens=4)
    session.reset()
    assert session.messages == []
    before = calls.num_prompt_tokens
    answer = session.ask(QUESTIONS[2], max_new_tokens=4)
    assert calls.num_prompt_tokens - before < 60
    assert answer == model.chat([{"role": "user", "content": QUESTIONS[2]}], images[1], max_new_tokens=4)


def test_the_cache_grows_with_the_conversation(model: SphinxModel, images) -> None:
    session = model.session(images[0], system="You see.")
    messages = [{"role": "system", "content": "You see."}]
    for words in (3, 100, 400):
        messages.append({"role": "user", "content": "why " * words})
        expected = model.chat(messages, images[0], max_new_tokens=5)
        assert session.ask("why " * words, max_new_tokens=5) == expected
        messages.append({"role": "assistant", "content": expected})


def test_streaming_shows_the_answer_and_may_be_left(model: SphinxModel, images) -> None:
    session = model.session(images[0])
    pieces = session.stream(QUESTIONS[0], max_new_tokens=20)
    next(pieces)
    pieces.close()
    assert session.messages == []  # an answer that was not complete is not kept
    text = "".join(session.stream(QUESTIONS[1], max_new_tokens=12))
    expected = model.chat([{"role": "user", "content": QUESTIONS[1]}], images[0], max_new_tokens=12)
    assert text.strip() == expected == session.messages[-1]["content"]


def test_sampling_repeats_by_seed(model: SphinxModel) -> None:
    def ask(seed: int) -> str:
        return model.session().ask("Why?", max_new_tokens=12, temperature=1.0, seed=seed)

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert ask(1) == model.chat([{"role": "user", "content": "Why?"}], max_new_tokens=12, temperature=1.0, seed=1)


def test_an_empty_answer_does_not_end_the_conversation(model: SphinxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinxkit.generation import GeneratedSequence, Generation

    session = model.session()
    with monkeypatch.context() as patch:
        patch.setattr(GeneratedSequence, "result", lambda self: Generation("", [], "eos"))
        assert session.ask("Why?", max_new_tokens=2) == ""
    assert session.messages[-1]["content"] == "(no answer)"
    session.ask("Why not?", max_new_tokens=2)


def test_bad_questions_change_nothing(model: SphinxModel, images) -> None:
    session = model.session(images[0])
    first = session.ask(QUESTIONS[0], max_new_tokens=4)
    before = list(session.messages)
    with pytest.raises(DataError, match=r"takes \d+ positions, 291 of them image tokens.*start a new one with reset"):
        session.ask("why " * 5000)
    with pytest.raises(DataError, match="is empty"):
        session.ask("  ")
    assert session.messages == before
    session.reset()
    assert session.ask(QUESTIONS[0], max_new_tokens=4) == first


def test_one_question_at_a_time(model: SphinxModel) -> None:
    session = model.session()
    pieces = session.stream(QUESTIONS[0], max_new_tokens=20)
    next(pieces)
    with pytest.raises(DataError, match="the session is answering another question"):
        session.ask(QUESTIONS[1], max_new_tokens=2)
    rest = list(pieces)
    assert rest
    assert session.ask(QUESTIONS[1], max_new_tokens=2) == model.chat(session.messages[:3], max_new_tokens=2)


def test_what_a_session_needs(model: SphinxModel, images) -> None:
    with pytest.raises(DataError, match="no conversation template"):
        SphinxModel(model.llm, tokenizer=model.tokenizer).session()
    with pytest.raises(DataError, match="no tokenizer"):
        SphinxModel(model.llm).session()
    with pytest.raises(DataError, match="no vision tower"):
        SphinxModel(model.llm, tokenizer=model.tokenizer, conversation=model.conversation).session(images[0])
    with pytest.raises(DataError, match="nowhere.png"):
        model.session(Path("nowhere.png"))
