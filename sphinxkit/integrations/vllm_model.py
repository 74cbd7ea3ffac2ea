"""The model class that vLLM's registry names; imported by vLLM's processes alone."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM


class SphinxForVllm(TransformersMultiModalForCausalLM):
    """vLLM's Transformers backend, told that the image token's id has no row in the embedding.

    Args:
        vllm_config: vLLM's configuration.
        prefix: Of the weights' names.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.configure_mm_token_handling(config.get_text_config().vocab_size, [config.image_token_id])
