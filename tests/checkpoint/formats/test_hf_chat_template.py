"""The template of a Hugging Face folder is recognised by the words that its chat template writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sphinxkit.checkpoint.formats.hf_chat_template import known_template
from sphinxkit.errors import CheckpointError
from tests.formatters.test_jinja import FAMILIES, THINKING

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Beginnings of the published files: Qwen2.5-7B-Instruct, SmolLM2-1.7B-Instruct, Llama-2-7b-chat-hf
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\n" + QWEN_SYSTEM + "<|im_end|>\\n' }}{%- endif %}"
)
SMOL = "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
LLAMA2 = "{{ '[INST] ' + '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + content + ' [/INST]' }}"


def config(folder: Path, template: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_known_ones(name: str, tmp_path: Path) -> None:
    assert known_template(config(tmp_path, FAMILIES[name][1])) == {"type": name}


def test_a_system_text_of_the_templates_own(tmp_path: Path) -> None:
    assert known_template(config(tmp_path, QWEN)) == {"type": "chatml", "system": QWEN_SYSTEM}
    smol = {"type": "chatml", "system": "You are a helpful AI assistant named SmolLM"}
    assert known_template(config(tmp_path, SMOL)) == smol


def test_where_a_template_lies(tmp_path: Path) -> None:
    assert known_template(tmp_path) is None
    config(tmp_path, [{"name": "tool_use", "template": SMOL}, {"name": "default", "template": FAMILIES["llama3"][1]}])
    assert known_template(tmp_path) == {"type": "llama3"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": FAMILIES["vicuna"][1]}))
    assert known_template(tmp_path) == {"type": "vicuna"}
    (tmp_path / "chat_template.jinja").write_text(FAMILIES["mistral"][1])
    assert known_template(tmp_path) == {"type": "mistral"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: cannot be read"):
        known_template(tmp_path)


@pytest.mark.parametrize("template", [LLAMA2, THINKING])
def test_others_are_named(template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert known_template(config(tmp_path, template)) is None
    assert "is none of llama3, chatml, mistral, vicuna, sphinx_v1, so sphinx_v1 is used" in caplog.text
