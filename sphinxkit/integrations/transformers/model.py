"""SPHINX for transformers: sphinxkit's vision tower in front of the library's own language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from sphinxkit.errors import DataError
from sphinxkit.integrations.transformers.config import SphinxConfig
from sphinxkit.recipe.build import build_vision_tower
from sphinxkit.vision import MAX_VIEWS, VisionTower


class SphinxPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = SphinxConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionTower"]  # noqa: RUF012 - the library reads lists; the language model adds its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; encoders that the recipe freezes stay frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.get_encoder("image").freeze_encoders()
        return loaded


class SphinxBackbone(SphinxPreTrainedModel):
    """Vision tower and language model, without a head.

    Args:
        config: Its recipe builds the tower, its ``text_config`` the language model.
    Raises:
        RecipeError: The recipe is not valid, has no vision, or names code.
    """

    def __init__(self, config: SphinxConfig) -> None:
        super().__init__(config)
        self.vision_tower: VisionTower = build_vision_tower(config.recipe or {}, config.text_config.hidden_size)
        for module in self.vision_tower.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # the recipe's builders have done it
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Visual tokens of each image.

        Args:
            pixel_values: From :class:`SphinxImageProcessor`.
            kwargs: Ignored; transformers and vLLM pass what other models take.
        Shape:
            pixel_values: (B, 3, S_img, S_img)
            return: ``pooler_output`` is a list of B tensors (N_img, D), ``last_hidden_state`` all of them
        Raises:
            ShapeError: The pixels have another size.
        """
        max_views = None if torch.is_grad_enabled() else MAX_VIEWS
        tokens: Tensor = self.vision_tower(pixel_values, max_views)
        tokens = tokens.to(self.get_input_embeddings().weight.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(tokens))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output for texts whose image tokens are replaced by the images' visual tokens.

        Args:
            input_ids: With ``N_img`` times ``image_token_id`` for each image.
            pixel_values: The images, in the order of their tokens.
            attention_mask: 0 where padded.
            position_ids: As in the language model.
            inputs_embeds: Instead of both ``input_ids`` and ``pixel_values``.
            kwargs: For the language model, the cache too.
        Shape:
            input_ids, attention_mask, position_ids: (B, S)
            pixel_values: (number of images, 3, S_img, S_img)
            inputs_embeds: (B, S, D)
        Raises:
            DataError: Images and image tokens do not fit, or not one of ids and embeddings is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("sphinx: expected one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values)  # type: ignore[arg-type]
        elif pixel_values is not None:
            raise DataError("sphinx: inputs_embeds hold the images already, got pixel_values too")
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        embedding = self.get_input_embeddings()
        if pixel_values is None:
            return embedding(input_ids)  # type: ignore[no-any-return]
        is_image = input_ids == self.config.image_token_id
        text: Tensor = embedding(input_ids.masked_fill(is_image, 0))
        images = torch.cat(self.get_image_features(pixel_values).pooler_output).to(text.device, text.dtype)
        if int(is_image.sum()) != len(images):
            raise DataError(
                f"sphinx: {int(is_image.sum())} image tokens in input_ids, but {len(pixel_values)} images have "
                f"{len(images)}; SphinxProcessor writes as many as needed"
            )
        return text.masked_scatter(is_image[..., None], images)


class SphinxForConditionalGeneration(SphinxPreTrainedModel, GenerationMixin):
    """SPHINX with the language model's head.

    Args:
        config: See :class:`SphinxBackbone`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: SphinxConfig) -> None:
        super().__init__(config)
        self.model = SphinxBackbone(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._tokenizer: Any = None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`SphinxBackbone.get_image_features`.

        Shape:
            pixel_values: (B, 3, S_img, S_img)
        """
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: See :meth:`SphinxBackbone.forward`.
            pixel_values: As there.
            attention_mask: As there.
            position_ids: As there.
            inputs_embeds: As there.
            labels: Aligned to ``input_ids``; -100 at positions without loss, image tokens among them.
            logits_to_keep: Number of last positions with logits (0: all), or their indices.
            kwargs: For the language model and the loss.
        Shape:
            labels: (B, S)
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        # the cache's name depends on the version: past_key_values, then cache
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. The tokenizer that stop strings need is read from the model's folder if none is given."""
        stops = kwargs.get("stop_strings") or getattr(
            kwargs.get("generation_config") or self.generation_config, "stop_strings", None
        )
        if stops and kwargs.get("tokenizer") is None:
            if self._tokenizer is None:
                self._tokenizer = AutoTokenizer.from_pretrained(self.config._name_or_path)
            kwargs["tokenizer"] = self._tokenizer
        return super().generate(*args, **kwargs)
