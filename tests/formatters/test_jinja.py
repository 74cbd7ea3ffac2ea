"""The language models' own templates against transformers' ``apply_chat_template``, ids and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sphinxkit import formatters
from sphinxkit.errors import DataError, RegistryError
from sphinxkit.formatters import IGNORE_INDEX, ConversationTemplate
from sphinxkit.tokenizer import Tokenizer
from tests.tokenizer.conftest import WRITERS

LLAMA3 = (
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('no system text here') }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
# Qwen3's history keeps no thoughts: an answer is written otherwise when others follow
THINKING = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'U:' + message.content }}"
    "{% else %}{{ 'A:' + ('<think></think>' if loop.last else '') + message.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{{ 'A:' if add_generation_prompt else '' }}"
)
FAMILIES = {
    "llama3": ("llama3", LLAMA3),
    "chatml": ("qwen", CHATML),
    "mistral": ("llama2", MISTRAL),
    "vicuna": ("llama2", VICUNA),
}
TURNS = [
    {"role": "user", "content": "What is a cat? A cat."},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Café?"},
    {"role": "assistant", "content": "Yes: \U0001f600\n- one\n- two"},
]
OURS = [*FAMILIES, "jinja"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("tokenizers")
    found = {}
    for name, write in WRITERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        write(found[name])
    return found


def theirs(folder: Path, template: str) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(folder)
    ends = {"eos_token": tokenizer._model._tokenizer.id_to_token(tokenizer.eos_id)}
    if tokenizer.bos_id >= 0:
        ends["bos_token"] = tokenizer._model._tokenizer.id_to_token(tokenizer.bos_id)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **ends
    )


def make(name: str, source: str, as_jinja: bool) -> ConversationTemplate:
    if as_jinja:
        return formatters.create("jinja", template=source)
    return formatters.create(name, **({"system": ""} if name == "vicuna" else {}))


def without_straddlers(template: ConversationTemplate, turns: Any, tokenizer: Tokenizer, mask: list[int]) -> list[bool]:
    """Their mask without tokens that begin before an answer: here those belong to the prompt."""
    rendered = template.render(turns)
    begin = int(tokenizer.bos_id >= 0)
    straddle = {
        begin + index
        for index, (first, last) in enumerate(template.encode_text(rendered.text, tokenizer)[1])
        for start, _ in rendered.answer_spans
        if first < start < last
    }
    return [bool(value) and index not in straddle for index, value in enumerate(mask)]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("as_jinja", [False, True], ids=["ours", "jinja"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_labels_are_those_of_apply_chat_template(name: str, as_jinja: bool, folders: dict[str, Path]) -> None:
    family, source = FAMILIES[name]
    tokenizer, their = Tokenizer(folders[family]), theirs(folders[family], source)
    template = make(name, source, as_jinja)
    system = [] if name == "mistral" else [{"role": "system", "content": "Be kind."}]
    for turns in (system + TURNS, system + TURNS[:2]):
        expected = their.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        found = template.encode(turns, tokenizer)
        assert found.token_ids == list(expected["input_ids"])
        learnt = [label != IGNORE_INDEX for label in found.labels]
        assert learnt == without_straddlers(template, turns, tokenizer, list(expected["assistant_masks"]))
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(found.labels, found.token_ids, strict=True))
    prompt = template.prompt(system + TURNS[:3])
    expected = their.apply_chat_template(system + TURNS[:3], add_generation_prompt=True, return_dict=True)
    bos = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    assert bos + template.encode_text(prompt, tokenizer)[0] == list(expected["input_ids"])


@pytest.mark.parametrize("name", FAMILIES)
def test_jinja_tells_the_same_spans_and_stops(name: str) -> None:
    ours, jinja = make(name, "", False), make(name, FAMILIES[name][1], True)
    system = [] if name == "mistral" else [{"role": "system", "content": "Be kind."}]
    for turns in (TURNS, TURNS[:3], TURNS[:1]):
        assert jinja.render(system + turns) == ours.render(system + turns)
    assert jinja.stop == ours.stop
    assert jinja.specials == ours.specials
    assert jinja.prompt(system + TURNS[:1], "The answer is") == ours.prompt(system + TURNS[:1], "The answer is")


@pytest.mark.parametrize("name", ["mistral", "vicuna"])
def test_a_tokenizer_that_spells_the_end_gets_its_token(name: str, golden: Path) -> None:
    """SentencePiece's; as transformers' slow tokenizers, which cut the text at their special tokens."""
    tokenizer = Tokenizer(golden / "llama_ens" / "tokenizer.model")
    template = make(name, "", False)
    found = template.encode(TURNS, tokenizer)
    text, spans = template.render(TURNS).text, template.render(TURNS).answer_spans
    pieces = text.split("</s>")
    ids = [tokenizer.bos_id]
    for piece in pieces[:-1]:
        ids += [*tokenizer.encode(piece), tokenizer.eos_id]
    assert found.token_ids == ids
    assert found.labels.count(tokenizer.eos_id) == 2 == len(spans)
    learnt = [label for label in found.labels if label not in (IGNORE_INDEX, tokenizer.eos_id)]
    assert tokenizer.decode(learnt).startswith("A cat.")


def test_what_a_template_refuses(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be kind."}]
    with pytest.raises(DataError, match="template 'mistral' has no place for a system text"):
        formatters.create("mistral").render(system + TURNS)
    with pytest.raises(DataError, match="the template fails: no system text here"):
        formatters.create("jinja", template=MISTRAL).render(system + TURNS)
    with pytest.raises(RegistryError, match="give either file or template"):
        formatters.create("jinja")
    with pytest.raises(RegistryError, match=r"none.jinja cannot be read: .*No such file"):
        formatters.create("jinja", file=str(tmp_path / "none.jinja"))
    with pytest.raises(RegistryError, match="the template fails: .*expected token"):
        formatters.create("jinja", template="{{ a b }}")
    with pytest.raises(RegistryError, match="changes the words of a message"):
        formatters.create("jinja", template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(DataError, match="writes message 1 otherwise when others follow"):
        formatters.create("jinja", template=THINKING.replace("'A:' +", "('A:' if loop.last else 'B:') +")).render(TURNS)
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert formatters.create("jinja", file=str(tmp_path / "chat.jinja")).stop == ("<|im_end|>",)


def test_what_a_template_puts_in_front_of_the_last_answer_alone() -> None:
    rendered = formatters.create("jinja", template=THINKING).render(TURNS)
    answers = [rendered.text[start:end] for start, end in rendered.answer_spans]
    assert answers == ["A cat.<|im_end|>", f"<think></think>{TURNS[3]['content']}<|im_end|>"]
