"""Configuration of the Hugging Face classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from sphinxkit.checkpoint.formats.hf_config import SPHINX


class SphinxConfig(PreTrainedConfig):
    """A SPHINX: the language model's own configuration, and the recipe that builds the vision tower.

    Args:
        text_config: Of the language model (LLaMA, Mistral, Qwen2, Qwen3).
        recipe: sphinxkit's recipe of kind model; it may name components, but no code to import.
        image_token_id: Stands in ``input_ids`` for each visual token; it needs no row in the embedding.
        tie_word_embeddings: Whether ``lm_head`` is the embedding.
    """

    model_type = SPHINX
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers reads it from the class

    text_config: Any = None
    recipe: dict[str, Any] | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            given = dict(self.text_config or {})
            self.text_config = AutoConfig.for_model(given.pop("model_type", "llama"), **given)
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
