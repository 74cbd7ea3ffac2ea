from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit.data.conversations import (
    OverLengthError,
    encode_sample,
    read_conversation,
    read_record,
    read_sample,
    write_conversation,
)
from sphinxkit.data.samples import Sample, StoredImage
from sphinxkit.errors import DataError
from sphinxkit.formatters import IGNORE_INDEX, sphinx_v1, tasks
from sphinxkit.tokenizer import Tokenizer

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def test_llava_and_chat_records_are_the_same() -> None:
    wanted = ({"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."})
    assert read_conversation({"conversations": TURNS}, "x") == wanted
    assert read_conversation({"messages": [dict(message) for message in wanted]}, "x") == wanted


def test_a_system_message_may_come_first() -> None:
    turns = [{"from": "system", "value": ""}, *TURNS]
    roles = [message["role"] for message in read_conversation({"conversations": turns}, "x")]
    assert roles == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, r"a:1: 'conversations' must be a list that is not empty, got None"),
        ([], r"a:1: 'conversations' must be a list that is not empty, got \[\]"),
        (["x"], r"a:1: message 0 must have 'from' and 'value', got 'x'"),
        ([{"from": "robot", "value": "x"}], r"a:1: message 0 must have 'from' and 'value'"),
        ([TURNS[0], {"from": "gpt", "value": 3}], r"a:1: message 1 must have 'from' and 'value'"),
        ([TURNS[1]], r"a:1: message 0 is the assistant's, expected the user's"),
        ([TURNS[0], TURNS[0]], r"a:1: message 1 is the user's, expected the assistant's"),
        ([TURNS[0], {"from": "system", "value": "x"}], r"a:1: message 1 is the system's"),
        ([TURNS[0], {"from": "gpt", "value": " "}], r"a:1: message 1 \(assistant\) is empty"),
        ([{"from": "human", "value": "<image>\n"}, TURNS[1]], r"a:1: message 0 \(user\) is empty"),
        ([*TURNS, TURNS[0]], r"a:1: the last message is the user's, expected the assistant's"),
    ],
)
def test_bad_conversations(turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_conversation({"conversations": turns}, "a:1")


texts = st.text(min_size=1, max_size=10).filter(lambda text: text.replace("<image>", "").strip())


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.sampled_from(["", "a.jpg"]))
def test_written_conversations_are_read_back(pairs: list[tuple[str, str]], image: str) -> None:
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    record = write_conversation("7", messages, image=image, task="vqa")
    sample = read_sample(record, "s:0", "a:1", Path("root"))
    assert sample.task == "vqa"
    assert sample.image == (Path("root/a.jpg") if image else None)
    if image and "<image>" not in messages[0]["content"]:
        messages[0]["content"] = "<image>\n" + messages[0]["content"]
    assert list(sample.messages) == messages


def test_an_image_is_marked_once() -> None:
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "x"}]
    record = write_conversation("1", messages, image="a.jpg")
    assert record == {
        "id": "1",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
    }


def test_plain_text_and_bad_records() -> None:
    sample = read_sample({"text": "Once."}, "s:0", "a:1", Path(), task="web")
    assert (sample.text, sample.task, sample.messages, sample.type) == ("Once.", "web", (), "text")
    with pytest.raises(DataError, match=r"a:1: 'text' must be a text that is not empty, got ' '"):
        read_sample({"text": " "}, "s:0", "a:1", Path())
    assert read_sample({"text": "x", "image": ["a"]}, "s:0", "a:1", Path("r")).image == Path("r/a")
    with pytest.raises(DataError, match=r"a:1: 'image' names 2 images"):
        read_sample({"text": "x", "image": ["a", "b"]}, "s:0", "a:1", Path())


def test_an_image_stays_below_a_root_that_was_named() -> None:
    record = {"image": "../photos/a.jpg", "text": "x"}
    assert read_sample(record, "s:0", "a:1", Path("r")).image == Path("r/../photos/a.jpg")
    for name in ("../photos/a.jpg", "/photos/a.jpg"):
        for spoken in ({"text": "x"}, {"conversations": [ASKED, SAID]}):
            with pytest.raises(DataError, match=rf"a:1: image '{name}' is not below the folder of images, r"):
                read_sample({**spoken, "image": name}, "s:0", "a:1", Path("r"), is_root=True)


ASKED = {"from": "human", "value": "<image>\nWhat?"}
SAID = {"from": "gpt", "value": "A bus."}
PLAIN = {"from": "human", "value": "What?"}


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ({"image": "a.jpg"}, "a.jpg"),
        ({"image": ["a.jpg"]}, "a.jpg"),
        ({"images": ["a.jpg"]}, "a.jpg"),
        ({"images": "a.jpg"}, "a.jpg"),
        ({"image": "a.jpg", "images": ["a.jpg"], "video": None}, "a.jpg"),
    ],
)
def test_one_image_in_its_forms(fields: dict[str, Any], image: str) -> None:
    for question in (ASKED, PLAIN):  # without a placeholder the image stands in front
        assert read_record({**fields, "conversations": [question, SAID]}, "x")[1] == image


@pytest.mark.parametrize("fields", [{}, {"image": ""}, {"image": None}, {"images": []}, {"video": ""}])
def test_no_image_in_its_forms(fields: dict[str, Any]) -> None:
    assert read_record({**fields, "conversations": [PLAIN, SAID]}, "x")[1] == ""


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": ["a", "b"], "conversations": [ASKED, SAID]}, "x: 'image' names 2 images; a sample has one at most"),
        ({"images": ["a", "b"], "conversations": [ASKED, SAID]}, "x: 'images' names 2 images"),
        ({"image": "a", "images": ["b"], "conversations": [ASKED, SAID]}, "name different images"),
        ({"image": {"path": "a"}, "conversations": [ASKED, SAID]}, "'image' must be a path, or a list of one, got"),
        ({"image": [" "], "conversations": [ASKED, SAID]}, "'image' must be a path, or a list of one, got"),
        ({"image": True, "conversations": [ASKED, SAID]}, "'image' must be a path, or a list of one, got True"),
        ({"video": "a.mp4", "conversations": [PLAIN, SAID]}, "it has 'video', which is not supported"),
        ({"videos": ["a.mp4"], "conversations": [PLAIN, SAID]}, "it has 'videos', which is not supported"),
        ({"image": "a", "audio": "a.wav", "conversations": [ASKED, SAID]}, "it has 'audio', which is not supported"),
        ({"image_path": "a", "conversations": [PLAIN, SAID]}, "no 'image' but 'image_path', .* call it 'image'"),
        ({"image": "", "img": "a", "conversations": [PLAIN, SAID]}, "no 'image' but 'img', which is not read"),
        (
            {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, SAID]},
            "message 0 holds '<video>'; an image is named by 'image' and marked <image>, and nothing else can be shown",
        ),
        (
            {"conversations": [{"from": "human", "value": "Picture 1: <img>a.jpg</img> What?"}, SAID]},
            "message 0 holds '<img>a.jpg</img>'",
        ),
        ({"conversations": [ASKED, SAID]}, "the questions hold <image> 1 times, but the record has no image"),
        (
            {"image": "a", "conversations": [ASKED, SAID, ASKED, SAID]},
            "the questions hold <image> 2 times, but the record has one image",
        ),
        (
            {"image": "a", "conversations": [PLAIN, {"from": "gpt", "value": "See <image>."}]},
            r"message 1 .assistant. holds <image>; only questions may",
        ),
        ({"system": 3, "conversations": [PLAIN, SAID]}, "'system' must be a text, got 3"),
        (
            {"system": "Be kind.", "conversations": [{"from": "system", "value": "Be."}, PLAIN, SAID]},
            "there is a 'system' and a system message as well",
        ),
    ],
)
def test_records_that_are_not_one_image_and_text(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_record(record, "x")
    with pytest.raises(DataError, match=message):
        read_sample(record, "s:0", "x", Path())


def test_talk_about_html_and_other_names_beside_an_image() -> None:
    question = {"from": "human", "value": "What is <video> and <img>?"}
    assert read_record({"conversations": [question, SAID]}, "x")[1] == ""
    assert read_record({"image": "a", "image_url": "https://b", "conversations": [ASKED, SAID]}, "x")[1] == "a"


def test_a_system_text_beside_the_conversation() -> None:
    messages, _ = read_record({"system": "Be kind.", "conversations": [PLAIN, SAID]}, "x")
    assert messages[0] == {"role": "system", "content": "Be kind."}
    assert len(messages) == 3
    assert len(read_record({"system": "", "conversations": [PLAIN, SAID]}, "x")[0]) == 2


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Tokenizer:
    return Tokenizer(golden / "llama_ens5" / "tokenizer.model")


CONVERSATION = Sample("s:0", "", read_conversation({"conversations": TURNS}, "x"), "", None, "a:1")
TEXT = Sample("s:1", "", (), "Once upon a time there was a dog.", None, "a:2")


def test_text_is_learnt_whole(tokenizer: Tokenizer) -> None:
    encoded = encode_sample(TEXT, sphinx_v1(), tokenizer)
    assert encoded.token_ids == tokenizer.encode(TEXT.text, bos=True, eos=True)
    assert encoded.labels == [IGNORE_INDEX, *encoded.token_ids[1:]]


@pytest.mark.parametrize("sample", [CONVERSATION, TEXT])
def test_policies_for_over_long_samples(tokenizer: Tokenizer, sample: Sample) -> None:
    template = sphinx_v1()
    whole = encode_sample(sample, template, tokenizer)
    length = len(whole.token_ids)
    assert encode_sample(sample, template, tokenizer, length) == whole
    with pytest.raises(
        DataError, match=rf"sample {sample.id}: {length} tokens, at most {length - 2} are allowed"
    ) as info:
        encode_sample(sample, template, tokenizer, length - 2)
    assert not isinstance(info.value, OverLengthError)
    with pytest.raises(OverLengthError, match=f"sample {sample.id}: {length} tokens"):
        encode_sample(sample, template, tokenizer, length - 2, "skip")
    cut = encode_sample(sample, template, tokenizer, length - 2, "truncate")
    assert cut.is_truncated
    assert cut.token_ids == whole.token_ids[:-2]
    assert cut.labels == whole.labels[:-2]


def test_nothing_left_to_learn_names_the_sample(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="sample s:0: conversation: there is nothing to learn"):
        encode_sample(CONVERSATION, sphinx_v1(), tokenizer, 5, "truncate")


def test_captions_and_questions_become_conversations() -> None:
    wordings = tasks.create("caption").wordings
    found = {}
    for number in range(40):
        sample = read_sample({"caption": "A cat.", "image": "a.png"}, f"s:{number}", "a:1", Path("r"), task="caption")
        assert sample.messages[1] == {"role": "assistant", "content": "A cat."}
        found[number] = sample.messages[0]["content"]
    assert set(found.values()) == set(wordings)
    detailed = read_sample({"caption": "x", "image": "a.png"}, "s:0", "a:1", Path(), task="detailed_caption")
    assert detailed.messages[0]["content"] in tasks.create("detailed_caption").wordings
    sample = read_sample({"question": "Who?", "answer": "Me.", "image": "a.png"}, "s:0", "a:1", Path("r"))
    assert [message["content"] for message in sample.messages] == ["Who?", "Me."]
    with pytest.raises(DataError, match="a:1: question, answer and caption must be texts, got 'Who\\?' and 3"):
        read_sample({"question": "Who?", "answer": 3}, "s:0", "a:1", Path())


def test_images_inside_of_an_archive() -> None:
    stored = StoredImage("a.tar:0.png", b"png")
    sample = read_sample({"caption": "A cat.", "image": stored}, "s:0", "a:1", Path("r"))
    assert sample.image is stored
    assert read_sample({"text": "x", "image": stored}, "s:0", "a:1", Path("r")).type == "image-text"
