"""The conversation templates."""

from __future__ import annotations

from sphinxkit.formatters.base import ConversationTemplate, register

SPHINX_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
"""System text of ``sphinx_v1``. Source: LLaMA2-Accessory, accessory/conversation/lib.py (default conversation)."""


@register("sphinx_v1")
def sphinx_v1(system: str = SPHINX_SYSTEM, coordinate_grid: int | None = None) -> ConversationTemplate:
    """The template that SPHINX was trained with: turns that begin with ``### Human:`` and ``### Assistant:``.

    Args:
        system: System text.
        coordinate_grid: Coordinates in questions are rounded to whole steps of 1/``coordinate_grid`` of the padded
            square's side, for a model that was trained with such coordinates alone (SPHINX-nano: 128); None: as given.
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
    )
