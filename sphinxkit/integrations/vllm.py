"""vLLM: serve the folders that ``sphinxkit convert --to hf`` writes, through its Transformers backend."""

from __future__ import annotations

from sphinxkit.integrations.optional import require
from sphinxkit.integrations.transformers import register as register_auto_classes

ARCHITECTURE = "SphinxForConditionalGeneration"  # as in config.json
# A text, so that no process imports the backend before it needs it.
BACKEND = "sphinxkit.integrations.vllm_model:SphinxForVllm"


def register() -> None:
    """Let vLLM know the architecture; its processes call this by the entry point ``vllm.general_plugins``.

    Raises:
        MissingPackageError: vLLM or transformers is not installed, or too old.
    """
    registry = require("vllm", "vllm").ModelRegistry
    register_auto_classes()
    if ARCHITECTURE not in registry.get_supported_archs():
        registry.register_model(ARCHITECTURE, BACKEND)


__all__ = ["register"]
