"""The conversation templates."""

from __future__ import annotations

from pathlib import Path

from sphinxkit.errors import RegistryError
from sphinxkit.formatters.base import ConversationTemplate, register
from sphinxkit.formatters.jinja import JinjaTemplate

SPHINX_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""System text of ``sphinx_v1``. Source: LLaMA2-Accessory, accessory/conversation/lib.py (default conversation)."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System text of ``vicuna``. Source: FastChat, fastchat/conversation.py, vicuna_v1.1."""


@register("sphinx_v1")
def sphinx_v1(
    system: str = SPHINX_SYSTEM, coordinate_grid: int | None = None, low_confidence: float | None = None
) -> ConversationTemplate:
    """The template that SPHINX was trained with: turns that begin with ``### Human:`` and ``### Assistant:``.

    Args:
        system: System text.
        coordinate_grid: Coordinates in questions are rounded to whole steps of 1/``coordinate_grid`` of the padded
            square's side, for a model that was trained with such coordinates alone (SPHINX-nano: 128); None: as given.
        low_confidence: Answers whose mean log-probability is below it are marked as uncertain; None: none.
    Source: LLaMA2-Accessory, accessory/conversation/lib.py (default conversation).
    """
    return ConversationTemplate(
        name="sphinx_v1",
        system=system,
        opening="\n\n###",
        roles={"user": " Human:", "assistant": " Assistant:"},
        separator="\n###",
        stop=("\n###",),
        coordinate_grid=coordinate_grid,
        low_confidence=low_confidence,
    )


@register("llama3")
def llama3(system: str = "") -> ConversationTemplate:
    """Llama 3's template.

    Args:
        system: System text; "" for none.
    Source: Meta-Llama-3-8B-Instruct, tokenizer_config.json. (Llama 3.1's adds dates to the system text.)
    """
    return ConversationTemplate(
        name="llama3",
        system=system,
        opening="",
        roles={role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")},
        separator="<|eot_id|>",
        stop=("<|eot_id|>",),
        gap="",
        system_frame=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        ends_with_eos=False,
    )


@register("chatml")
def chatml(system: str = "") -> ConversationTemplate:
    """ChatML, as Qwen and SmolLM2 use it; without thinking.

    Args:
        system: System text; "" for none. Qwen2.5's own is "You are Qwen, created by Alibaba Cloud. You are a helpful
            assistant."
    Source: Qwen2.5-7B-Instruct, tokenizer_config.json.
    """
    return ConversationTemplate(
        name="chatml",
        system=system,
        opening="",
        roles={role: f"<|im_start|>{role}\n" for role in ("user", "assistant")},
        separator="<|im_end|>",
        stop=("<|im_end|>",),
        gap="",
        tail="\n",
        system_frame=("<|im_start|>system\n", "<|im_end|>\n"),
        ends_with_eos=False,
    )


@register("mistral")
def mistral() -> ConversationTemplate:
    """Mistral 7B Instruct's template; it has no place for a system text.

    Source: Mistral-7B-Instruct-v0.2, tokenizer_config.json.
    """
    return ConversationTemplate(
        name="mistral",
        system="",
        opening="",
        roles={"user": "[INST]", "assistant": ""},
        separator="</s>",
        stop=("</s>",),
        user_separator=" [/INST]",
        system_frame=None,
        specials=("</s>",),
        ends_with_eos=False,
    )


@register("vicuna")
def vicuna(system: str = VICUNA_SYSTEM) -> ConversationTemplate:
    """Vicuna 1.1's template, which LLaVA 1.5 uses, too.

    Args:
        system: System text.
    Source: FastChat, fastchat/conversation.py, vicuna_v1.1.
    """
    return ConversationTemplate(
        name="vicuna",
        system=system,
        opening=" ",
        roles={"user": "USER:", "assistant": "ASSISTANT:"},
        separator="</s>",
        stop=("</s>",),
        user_separator=" ",
        specials=("</s>",),
        ends_with_eos=False,
    )


@register("jinja")
def jinja(
    file: str | None = None,
    *,
    template: str | None = None,
    system: str = "",
    eos_token: str = "</s>",  # noqa: S107
) -> ConversationTemplate:
    """A chat template in Jinja, as Hugging Face's tokenizers carry it.

    It runs in Jinja's sandbox. ``bos_token`` is empty, because the tokenizer adds beginning-of-sentence.

    Args:
        file: The template's file.
        template: The template's text, instead of a file.
        system: System text; "" leaves the choice to the template.
        eos_token: Value of ``eos_token`` in the template.
    Raises:
        RegistryError: Neither or both of file and text; the file cannot be read; it is no template; or what it writes
            cannot be divided into questions and answers.
    """
    if (file is None) == (template is None):
        raise RegistryError("conversation 'jinja': give either file or template")
    if file is not None:
        try:
            template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RegistryError(f"conversation 'jinja': {file} cannot be read: {error}") from error
    return JinjaTemplate.parse(template or "", system, eos_token)
