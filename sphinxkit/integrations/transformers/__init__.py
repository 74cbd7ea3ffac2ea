"""SPHINX as classes of Hugging Face's transformers: configuration, model, image processor, processor."""

from __future__ import annotations

from sphinxkit.integrations.optional import require

EXTRA = "transformers"
OLDEST = "5.16"


def register() -> None:
    """Let transformers' Auto classes know model type ``sphinx``; can be called any number of times.

    Afterwards ``AutoConfig``, ``AutoModel``, ``AutoModelForImageTextToText``, ``AutoImageProcessor`` and
    ``AutoProcessor`` read the folders that ``sphinxkit convert --to hf`` writes, without ``trust_remote_code``.

    Raises:
        MissingPackageError: transformers is not installed, or too old.
    """
    require("transformers", EXTRA, oldest=OLDEST)
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from sphinxkit.integrations.transformers.config import SphinxConfig
    from sphinxkit.integrations.transformers.model import SphinxBackbone, SphinxForConditionalGeneration
    from sphinxkit.integrations.transformers.processor import SphinxImageProcessor, SphinxProcessor

    AutoConfig.register(SphinxConfig.model_type, SphinxConfig, exist_ok=True)
    AutoModel.register(SphinxConfig, SphinxBackbone, exist_ok=True)
    AutoModelForImageTextToText.register(SphinxConfig, SphinxForConditionalGeneration, exist_ok=True)
    backends = dict.fromkeys(("pil", "torchvision"), SphinxImageProcessor)  # one class: pixels do not depend on it
    AutoImageProcessor.register(SphinxConfig, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(SphinxConfig, SphinxProcessor, exist_ok=True)


__all__ = ["register"]
