from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sphinxkit import formatters
from sphinxkit.errors import DataError
from sphinxkit.formatters import IGNORE_INDEX, ConversationTemplate, clean_content
from sphinxkit.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TYPES = ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light"]
ROLES = {"human": "user", "gpt": "assistant"}
Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "llama_ens5" / "tokenizer.model")


@pytest.fixture(scope="module")
def template() -> ConversationTemplate:
    return formatters.create("sphinx_v1")


def load(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "golden.json").read_text())


def dialogue(*turns: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.mark.parametrize("name", TYPES)
def test_prompts_equal_the_public_implementation(name: str, template: ConversationTemplate) -> None:
    golden = load(name)
    tokenizer = Tokenizer(GOLDEN / name / "tokenizer.model")
    assert len(golden["conversations"]) == 5
    for case in golden["conversations"]:
        messages = dialogue(*[turn for pair in case["qas"] for turn in pair if turn is not None])
        prompt = template.prompt(messages)
        assert prompt == case["prompt"]
        assert tokenizer.encode(prompt, bos=True) == case["token_ids"]
        rendered = template.render(messages)
        answers = [rendered.text[start:end] for start, end in rendered.answer_spans]
        assert [answer.removeprefix(" ") for answer in answers] == case["to_predict"]
    assert template.stop == (golden["conversations"][0]["response_end_signal"],)


@pytest.mark.parametrize("name", TYPES)
def test_ids_and_labels_equal_the_public_implementation(name: str, template: ConversationTemplate) -> None:
    tokenizer = Tokenizer(GOLDEN / name / "tokenizer.model")
    with safe_open(GOLDEN / name / "golden.safetensors", "pt") as tensors:
        for case in load(name)["dataset"]:
            item = case["item"]
            messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in item["conversations"]]
            max_tokens = case["max_words"] - (case["image_words"] if "image" in item else 0)
            encoded = template.encode(messages, tokenizer, max_tokens)
            padding = [0] * (max_tokens - len(encoded.token_ids))
            assert encoded.token_ids + padding == tensors.get_tensor(f"dataset.{case['name']}.input_ids").tolist()
            assert encoded.is_truncated == (case["name"] == "text_truncated")
            if case["name"] != "answer_repeats_question_text":  # the reference is wrong there: see the next test
                labels = [0 if label == IGNORE_INDEX else label for label in encoded.labels] + padding
                assert labels == tensors.get_tensor(f"dataset.{case['name']}.labels").tolist()
                assert sum(label != IGNORE_INDEX for label in encoded.labels) == case["n_labelled"]


def test_label_is_on_the_answer_where_the_question_repeats_it(
    template: ConversationTemplate, tokenizer: Tokenizer
) -> None:
    """The public implementation searches for the answer's tokens and labels the question "It is blue." instead."""
    item = next(case for case in load("llama_ens5")["dataset"] if case["name"] == "answer_repeats_question_text")
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in item["item"]["conversations"]]
    encoded = template.encode(messages, tokenizer)
    words = tokenizer.encode("It is blue.\n###")
    starts = [i for i in range(len(encoded.token_ids)) if encoded.token_ids[i : i + len(words)] == words]
    assert len(starts) == 2
    question, answer = starts
    assert set(encoded.labels[:answer]) == {IGNORE_INDEX}
    assert question < answer
    assert encoded.labels[answer : answer + len(words)] == words
    assert sum(label != IGNORE_INDEX for label in encoded.labels) == item["n_labelled"]


def test_hand_written_prompts(template: ConversationTemplate) -> None:
    own = formatters.create("sphinx_v1", system="S")
    assert own.prompt(dialogue("Hi")) == "S\n\n### Human: Hi\n### Assistant:"
    assert own.prompt(dialogue("Hi", "Yo")) == "S\n\n### Human: Hi\n### Assistant: Yo\n###"
    assert own.prompt(dialogue(" <image>\nHi ", "Yo ", "2")) == (
        "S\n\n### Human: Hi\n### Assistant: Yo\n### Human: 2\n### Assistant:"
    )
    system = {"role": "system", "content": "Be brief."}
    assert template.prompt([system, *dialogue("Hi")]) == "Be brief.\n\n### Human: Hi\n### Assistant:"
    assert own.prompt(dialogue("Hi"), answer_start=" The answer is") == (
        "S\n\n### Human: Hi\n### Assistant: The answer is"
    )
    assert clean_content("a <image> b<image>") == "a  b"


def test_the_spans_of_a_replaced_system_text(template: ConversationTemplate) -> None:
    rendered = template.render([{"role": "system", "content": "Be brief."}, *dialogue("Hi", "Yo", "x", "z")])
    assert [rendered.text[start:end] for start, end in rendered.answer_spans] == [" Yo\n###", " z\n###"]


turns = st.text(max_size=20).map(lambda text: text.replace("▁", "")).filter(clean_content)


@given(data=st.lists(turns, min_size=2, max_size=6))
def test_labels_are_the_answers_whatever_they_say(
    data: list[str], template: ConversationTemplate, tokenizer: Tokenizer
) -> None:
    messages = dialogue(*data)
    encoded = template.encode(messages, tokenizer)
    assert encoded.token_ids == tokenizer.encode(template.prompt(messages), bos=True, eos=True)
    assert len(encoded.labels) == len(encoded.token_ids)
    learnt = [i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    assert all(encoded.labels[i] == encoded.token_ids[i] for i in learnt)
    assert encoded.labels[-1] == IGNORE_INDEX
    answers = "".join(f" {clean_content(turn)}\n###" for turn in data[1::2])
    assert tokenizer.decode([encoded.token_ids[i] for i in learnt]) == answers.removeprefix(" ")


class RegexTokenizer:
    """One token per match, numbered by what it matches; unknown is -1 and never comes."""

    bos_id, eos_id, unk_id = 1000, 1001, -1

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        matches = list(self.pattern.finditer(text))
        return [len(match.group()) for match in matches], [match.span() for match in matches]


def test_a_token_across_the_edge_belongs_to_where_it_begins() -> None:
    own = formatters.create("sphinx_v1", system="S")
    messages = dialogue("q", "ab", "q", "cd")
    text = own.prompt(messages)
    # ": a" begins in the prompt and reaches into the answer "ab", "### Hu" begins in its separator and reaches beyond
    encoded = own.encode(messages, RegexTokenizer(r": a|### Hu|."))
    learnt = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert learnt == [1, 1, 6] + [1] * len(" cd\n###")  # "b", "\n", "### Hu", then the second answer by the letter
    everything = own.encode(messages, RegexTokenizer(r"."))
    assert len(everything.labels) == len(text) + 2
    assert sum(label != IGNORE_INDEX for label in everything.labels) == len(" ab\n### cd\n###")


def test_id_zero_is_learnt_unless_it_is_the_unknown_token() -> None:
    class Letters:
        """One token per character; "a" is 0, anything but a letter is unknown."""

        bos_id, eos_id = 30, 31

        def __init__(self, unk_id: int) -> None:
            self.unk_id = unk_id

        def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            ids = [ord(c) - ord("a") if c.islower() else 29 for c in text]
            return ids, [(i, i + 1) for i in range(len(text))]

    own = formatters.create("sphinx_v1", system="S")
    labels = own.encode(dialogue("q", "ba"), Letters(unk_id=29)).labels
    assert [label for label in labels if label != IGNORE_INDEX] == [1, 0]  # " ", "\n" and "###" are unknown to it
    labels = own.encode(dialogue("q", "ba"), Letters(unk_id=0)).labels
    assert [label for label in labels if label != IGNORE_INDEX] == [29, 1, 29, 29, 29, 29]


def test_an_open_answer_teaches_nothing(template: ConversationTemplate, tokenizer: Tokenizer) -> None:
    encoded = template.encode(dialogue("a", "It is blue.", "b"), tokenizer)
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == tokenizer.encode("It is blue.\n###")
    with pytest.raises(DataError, match="nothing to learn; 0 answers in all"):
        template.encode(dialogue("a"), tokenizer)


def test_nothing_left_to_learn_after_the_cut(template: ConversationTemplate, tokenizer: Tokenizer) -> None:
    whole = template.encode(dialogue("What?", "It is blue."), tokenizer)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    cut = template.encode(dialogue("What?", "It is blue."), tokenizer, max_tokens=first + 1)
    assert cut.labels == whole.labels[: first + 1]
    with pytest.raises(DataError, match=rf"nothing to learn in the first {first} of {len(whole.labels)} tokens; 1 ans"):
        template.encode(dialogue("What?", "It is blue."), tokenizer, max_tokens=first)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ([{"role": "system", "content": "x"}], "only a system message"),
        ("hi", r"messages must be a list of .* got str: 'hi'"),
        ({"role": "user", "content": "x"}, "messages must be a list of .* got dict"),
        (["hi"], r"message 0 must have a role and a content, got 'hi'"),
        ([{"role": "user"}], "message 0 must have a role and a content"),
        ([{"role": "human", "content": "x"}], "message 0 has role 'human', expected system, user or assistant"),
        ([{"role": "user", "content": None}], r"message 0 \(user\) has a NoneType as its content"),
        ([{"role": "assistant", "content": "x"}], "message 0 is the assistant's, expected the user's"),
        ([*dialogue("a"), *dialogue("b")], "message 1 is the user's, expected the assistant's"),
        ([*dialogue("a"), {"role": "system", "content": "x"}], "message 1 is the system's, expected the assistant's"),
        (dialogue("<image> "), r"message 0 \(user\) is empty"),
        (dialogue("a", "\n"), r"message 1 \(assistant\) is empty"),
    ],
)
def test_bad_conversations(messages: Any, message: str, template: ConversationTemplate, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=message):
        template.prompt(messages)
    with pytest.raises(DataError, match=message):
        template.encode(messages, tokenizer)


def test_answer_start_needs_an_open_answer(template: ConversationTemplate) -> None:
    with pytest.raises(DataError, match="answer_start 'x' needs a last message of the user"):
        template.prompt(dialogue("a", "b"), answer_start="x")
