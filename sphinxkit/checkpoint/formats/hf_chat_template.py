"""Which of the known templates a Hugging Face folder's chat template is."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.files import read_json

_logger = logging.getLogger(__name__)

_SIGNS = {
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]"),
    "vicuna": ("USER:", "ASSISTANT:"),
    "sphinx_v1": ("### Human:", "### Assistant:"),
}
"""Words that a template of this name writes."""
_NOT = {"mistral": ("<<SYS>>", "[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]")}
"""Words of other templates with the same signs: LLaMA 2's, later Mistrals'."""
_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^<{}']+)<\|im_end\|>")
"""The system text that a ChatML template writes where there is none, as Qwen2.5's and SmolLM2's do."""


def known_template(folder: Path) -> dict[str, Any] | None:
    """The recipe's ``conversation`` for a folder's chat template; None where it has none, or one that is not known.

    Args:
        folder: Of a language model.
    Raises:
        CheckpointError: A file is damaged.
    """
    text = _template(folder)
    if text is None:
        return None
    for name, signs in _SIGNS.items():
        if all(sign in text for sign in signs) and not any(sign in text for sign in _NOT.get(name, ())):
            system = _SYSTEM.search(text) if name == "chatml" else None
            return {"type": name} | ({"system": system[1]} if system else {})
    _logger.warning(
        "%s: its chat template is none of %s, so sphinx_v1 is used; a recipe may name another: "
        "conversation: {type: jinja, file: ...}",
        folder,
        ", ".join(_SIGNS),
    )
    return None


def _template(folder: Path) -> str | None:
    """The text of a folder's chat template."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # several, by name
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None
