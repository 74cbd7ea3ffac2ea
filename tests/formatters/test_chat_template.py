"""The Jinja text writes what the template writes, in transformers' own environment."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit import formatters
from sphinxkit.errors import DataError
from sphinxkit.formatters.base import ConversationTemplate
from sphinxkit.formatters.chat_template import chat_template

TEMPLATES: list[tuple[str, dict[str, Any]]] = [
    ("sphinx_v1", {}),
    ("sphinx_v1", {"system": "", "coordinate_grid": 128}),
    ("llama3", {}),
    ("chatml", {"system": 'It\'s "so" \\ é 😀\n'}),
    ("vicuna", {}),
    ("mistral", {}),
]
CONVERSATION = [
    {"role": "user", "content": " <image>\nWhat is it? "},
    {"role": "assistant", "content": "A cross."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes\n"},
    {"role": "user", "content": "{{ 1 + 1 }}"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def rendered(source: str, messages: list[dict[str, Any]], *, spans: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """Text and answer spans from transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], found = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=True,
        return_assistant_tokens_mask=spans,
        **{"bos_token": "<s>", "eos_token": "</s>"},
    )
    return text, [tuple(span) for span in found[0]] if spans else []


@pytest.mark.parametrize(("name", "options"), TEMPLATES)
@pytest.mark.parametrize("length", range(1, 6))
def test_text_and_answers_of_every_template(name: str, options: dict[str, Any], length: int) -> None:
    template = formatters.create(name, **options)
    source = chat_template(template, has_bos=True)
    for messages in [CONVERSATION[:length], *([[SYSTEM, *CONVERSATION[:length]]] if name != "mistral" else [])]:
        expected = template.render(messages)
        text, spans = rendered(source, messages)
        assert text == "<s>" + expected.text
        assert spans == [(start + 3, end + 3) for start, end in expected.answer_spans]


def test_an_image_stands_before_all_text() -> None:
    template = formatters.create("sphinx_v1")
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}]
    expected = template.prompt([{"role": "user", "content": "What is it?"}])
    assert rendered(chat_template(template, has_bos=True), messages)[0] == f"<s><image>{expected}"
    assert rendered(chat_template(template, has_bos=False), messages)[0] == f"<image>{expected}"


_NUMBERS = st.sampled_from(["0.101", ".5", "1.9", "0.300", "1", "2.5", "0.", "", "x", "0.599", "٠.٥", "0.²"])
_SPACES = st.sampled_from(["", " ", "\n"])
_CELLS = st.tuples(_SPACES, _NUMBERS, _SPACES).map("".join)
_GROUPS = st.lists(_CELLS, min_size=1, max_size=5).map(",".join)
_LISTS = st.lists(_GROUPS, min_size=1, max_size=3).map(";".join)
_WORDS = st.sampled_from(["a ", "[", "]", " b", "[]", "0.25"])


@given(st.lists(st.one_of(_LISTS.map("[{}]".format), _WORDS), min_size=1, max_size=5).map("".join))
def test_coordinates_move_to_the_grid(text: str) -> None:
    template = formatters.create("sphinx_v1", coordinate_grid=128)
    messages = [{"role": "user", "content": f"Look: {text}."}]
    assert rendered(chat_template(template, has_bos=False), messages)[0] == template.prompt(messages)


def test_a_template_of_ones_own_is_kept() -> None:
    text = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    text += "{% if add_generation_prompt %}<assistant>{% endif %}"
    template = formatters.create("jinja", template=text, system="Be brief.")
    source = chat_template(template, has_bos=True)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Well?"}]}]
    expected = template.prompt([{"role": "user", "content": "Well?"}])
    assert rendered(source, messages, spans=False)[0] == f"<s><image>{expected}"
    assert rendered(source, [SYSTEM | {"content": "S"}, CONVERSATION[0]], spans=False)[0].startswith("<s><system>S</s>")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([CONVERSATION[1]], "user and assistant speak in turn"),
        ([CONVERSATION[0], CONVERSATION[0]], "user and assistant speak in turn"),
        ([{"role": "user", "content": "<image> "}], "a message is empty"),
        ([{"role": "user", "content": [{"type": "image"}] * 2}], "SPHINX reads one image a conversation"),
    ],
)
def test_messages_out_of_order(messages: list[dict[str, Any]], message: str) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=message):
        rendered(chat_template(formatters.create("sphinx_v1"), has_bos=True), messages)


def test_templates_without_a_chat_template() -> None:
    from jinja2 import TemplateError

    class Own(ConversationTemplate):
        pass

    plain = formatters.create("sphinx_v1")
    own = Own("own", "", "", plain.roles, "\n", ("\n",))
    with pytest.raises(DataError, match="conversation 'own': a Own has no chat template in Jinja"):
        chat_template(own, has_bos=True)
    with pytest.raises(TemplateError, match="no place for a system text"):
        rendered(chat_template(formatters.create("mistral"), has_bos=True), [SYSTEM, CONVERSATION[0]])
