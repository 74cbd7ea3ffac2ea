"""SphinxModel: vision tower + LLaMA. It is built from finished parts and reads no configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sphinxkit.errors import CheckpointError, DataError, ShapeError
from sphinxkit.formatters import Message, check_messages
from sphinxkit.formatters.tasks import Task, TaskQuestion
from sphinxkit.generation import Generation, Sampling, stop_strings
from sphinxkit.pixels import check_pixels
from sphinxkit.sphinx_model import multimodal, scoring
from sphinxkit.sphinx_model.answers import TaskAnswer, read_question
from sphinxkit.sphinx_model.images import ImageInput
from sphinxkit.sphinx_model.prompts import Prompt, embed_prompts, make_decoder
from sphinxkit.sphinx_model.scoring import Score
from sphinxkit.sphinx_model.session import ChatSession
from sphinxkit.to_device import to_device

if TYPE_CHECKING:
    from sphinxkit.formatters import ConversationTemplate
    from sphinxkit.llama import LlamaModel
    from sphinxkit.tilers import ImageSource
    from sphinxkit.tokenizer import Tokenizer
    from sphinxkit.vision import VisionTower


class SphinxModel(nn.Module):
    """SPHINX model: vision tower + LLaMA. Image tokens are inserted after the first text token.

    Args:
        llm: The language model.
        vision: Turns pixels into tokens of the language model's width; None for a text-only model.
        tokenizer: Required by every method that reads or writes text.
        conversation: Chat template.
        end_ids: Token ids that end an answer, in addition to end-of-sentence (for example an end-of-turn token).
        recipe_yaml: Recipe that ``save`` writes beside the weights, so that ``sphinxkit.load`` can rebuild the model.

    Source: SPHINX, arXiv:2311.07575.
    """

    def __init__(
        self,
        llm: LlamaModel,
        vision: VisionTower | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        conversation: ConversationTemplate | None = None,
        end_ids: Sequence[int] = (),
        recipe_yaml: str | None = None,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.vision = vision
        self.tokenizer = tokenizer
        self.conversation = conversation
        self._end_ids = tuple(end_ids)
        self.recipe_yaml = recipe_yaml

    # -- what the model is --------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.llm.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model's weights."""
        return self.llm.embed_tokens.weight.dtype

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer beside end-of-sentence: those given, and the template's stops that are tokens."""
        stops: Sequence[str] = () if self.conversation is None else self.conversation.stop
        found = [] if self.tokenizer is None else [self.tokenizer.control_id(stop) for stop in stops]
        return tuple(dict.fromkeys((*self._end_ids, *(token for token in found if token is not None))))

    def require_vision(self) -> VisionTower:
        """Return the vision tower, or raise DataError if the model has none."""
        if self.vision is None:
            raise DataError("this model has no vision tower: it takes text alone")
        return self.vision

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, or raise DataError if the model has none."""
        if self.tokenizer is None:
            raise DataError("this model has no tokenizer: set model.tokenizer = Tokenizer(path)")
        return self.tokenizer

    def accelerate(self, mode: Literal["auto", "compile"] | None = "auto") -> None:
        """Choose how generation is accelerated.

        If a module has hooks, adapters or replaced weights, generation falls back to the plain modules. Training always
        uses the plain modules. In float32, greedy and seeded output is the same in every mode; in 16 bit, logits agree
        within rounding.

        Args:
            mode: "auto" fuses projections and, on a CPU, compiles a kernel for small batches. It does so at the first
                generation, which takes about a second for a large model. "compile" adds ``torch.compile``, whose first
                call takes minutes. None: no acceleration.

        Raises:
            DataError: The mode is unknown, or "compile" is used with another library's language model.
            RegistryError: "compile" cannot run on this machine or with the model's attention backend.
        """
        if mode is None:  # needs nothing of the accelerations
            self.llm.accelerator = None
            return
        from sphinxkit.acceleration import accelerate

        accelerate(self.llm, mode)

    # -- images -------------------------------------------------------------------------------------------------------

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Pad, resize and normalise images.

        Args:
            images: One or more PIL images, paths, bytes, binary files or uint8 arrays (H, W, 3). EXIF orientation is
                applied.

        Shape:
            return: (B, 3, S, S) float32 on the CPU, CLIP-normalised
        Raises:
            DataError: An image cannot be read.
        """
        from sphinxkit.tilers import preprocess

        return preprocess(images, self.require_vision().image_size)

    def encode_images(self, pixels: Tensor, max_views: int | None = None) -> Tensor:
        """Encode images to visual tokens: [start, tokens, end] of every view.

        Args:
            pixels: From ``preprocess``.
            max_views: Maximum number of views per encoder pass, which bounds memory; None: all views at once.

        Shape:
            pixels: (B, 3, S, S)
            return: (B, N_img, D) in the language model's dtype
        Raises:
            ShapeError: The pixels have another size, or ``max_views`` is not positive. DataError: they are no tensor.
        """
        tokens: Tensor = self.require_vision()(to_device(check_pixels(pixels, "encode_images"), self.device), max_views)
        return tokens.to(self.dtype)

    # -- logits and loss ----------------------------------------------------------------------------------------------

    def forward(
        self,
        token_ids: Tensor,
        pixels: Tensor | None = None,
        image_rows: Sequence[int] | None = None,
        seq_lens: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of the next token at every text position.

        Args:
            token_ids: Right-padded rows, or one row of packed samples with ``seq_lens``.
            pixels: Images, from ``preprocess``.
            image_rows: Row (or packed sample) of each image; None: one image per row, in order.
            seq_lens: Text length of each sample in a packed row. Samples do not attend to each other.

        Shape:
            token_ids: (B, S) int64
            pixels: (number of images, 3, S_img, S_img)
            return: (B, S, vocab); i predicts token i + 1; with an image, position 0 is read at its last slot
        Raises:
            ShapeError: The rows, images and lengths are inconsistent.
        """
        logits: Tensor = self.llm.lm_head(self._hidden_states(token_ids, pixels, image_rows, seq_lens))
        return logits

    def loss(
        self,
        token_ids: Tensor,
        labels: Tensor,
        pixels: Tensor | None = None,
        image_rows: Sequence[int] | None = None,
        seq_lens: Sequence[int] | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Cross entropy over the labelled tokens. Logits are computed only at labelled positions.

        In training mode, a mixture of experts adds its weighted balance loss; see ``loss_sums``.

        Args:
            token_ids: As in ``forward``.
            labels: Aligned to ``token_ids``; -100 at positions without loss.
            pixels: As in ``forward``.
            image_rows: As in ``forward``.
            seq_lens: As in ``forward``.
            reduction: "mean" over the labelled tokens, or "none" for (sum, count) of the cross entropy, which lets
                the caller weight batches by token count.

        Shape:
            token_ids, labels: (B, S)
            return: scalar; with "none" two scalars. Without labels the loss is 0 and still connected to the graph.
        Raises:
            ShapeError: As ``forward``; or labels of another shape.
        """
        if reduction not in ("mean", "none"):
            raise DataError(f"loss: reduction must be 'mean' or 'none', got {reduction!r}")
        total, count, balance = self.loss_sums(token_ids, labels, pixels, image_rows, seq_lens)
        if reduction == "none":
            return total, count
        mean = total / count.clamp(min=1)
        return mean if balance is None else mean + self.load_balancing_weight * balance

    def loss_sums(
        self,
        token_ids: Tensor,
        labels: Tensor,
        pixels: Tensor | None = None,
        image_rows: Sequence[int] | None = None,
        seq_lens: Sequence[int] | None = None,
    ) -> multimodal.LossSums:
        """The parts of ``loss``, which has the arguments: cross entropy, labelled tokens, balance loss.

        The balance loss exists in training mode for a mixture of experts. It is the mean over layers, over every row
        that is routed: image tokens and padding, too. Padded rows are cut behind the last label first.

        Shape:
            token_ids, labels: (B, S)
            return: two scalars, and a scalar or None
        Raises:
            ShapeError: As ``loss``.
        """
        if labels.shape != token_ids.shape:
            raise ShapeError(f"labels {tuple(labels.shape)} do not match token_ids {tuple(token_ids.shape)}")
        balances: list[Tensor] | None = None
        if self.llm.training and getattr(self.llm, "moe", None) is not None:
            balances = []
            if seq_lens is None:
                token_ids, labels = multimodal.cut_unlabelled(token_ids, labels)
        hidden = self._hidden_states(token_ids, pixels, image_rows, seq_lens, balances)
        total, count = multimodal.loss_sums(self.llm, hidden, labels, seq_lens)
        return multimodal.LossSums(total, count, torch.stack(balances).mean() if balances else None)

    @property
    def load_balancing_weight(self) -> float:
        """Factor on the balance loss in training; 0 for a model without experts."""
        moe = getattr(self.llm, "moe", None)
        return 0.0 if moe is None else moe.load_balancing_weight

    def _hidden_states(
        self,
        token_ids: Tensor,
        pixels: Tensor | None,
        image_rows: Sequence[int] | None,
        seq_lens: Sequence[int] | None,
        balances: list[Tensor] | None = None,
    ) -> Tensor:
        images = None if pixels is None or len(pixels) == 0 else self.encode_images(pixels)
        return multimodal.hidden_states(self.llm, token_ids, images, image_rows, seq_lens, balances)

    # -- text ---------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Sequence[ImageInput | None] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] | None = ("\n###",),
        seed: int | Sequence[int | None] | None = None,
        truncate: Literal["left"] | None = None,
        num_draft_tokens: int | None = None,
    ) -> list[Generation]:
        r"""Generate text for prompts of any length, each with or without an image.

        Args:
            prompts: Raw text. The beginning-of-sentence token is added; no template is applied. A prompt with an image
                may be empty.
            images: One image or None per prompt; or None for no images. ``ImageInput`` lists the accepted types. A
                repeated image is encoded once.
            max_new_tokens: Maximum number of new tokens per prompt.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            stop: Strings that end an answer.
            seed: Random seed for sampling. A single number is used for each prompt separately, so answers do not depend
                on the rest of the batch (equal prompts have equal answers). A sequence gives one seed per prompt.
            truncate: "left" drops the oldest text after the beginning-of-sentence token until prompt, image and
                ``max_new_tokens`` fit into the context. None: the answer is cut at the end of the context, and a prompt
                that leaves no room for an answer is an error.
            num_draft_tokens: Maximum number of tokens drafted by prompt lookup; see ``generation.Decoder``.

        Returns:
            One ``Generation`` for each prompt, in order.

        Raises:
            DataError: A prompt is empty or too long, the number of images or seeds differs from the number of prompts,
                an image cannot be read, or logits are not finite.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, stop_strings(stop))
        return make_decoder(self, prompts, images, sampling, seed, truncate, num_draft_tokens).run()

    def stream(
        self,
        prompt: str,
        image: ImageInput | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] | None = ("\n###",),
        seed: int | None = None,
        truncate: Literal["left"] | None = None,
        num_draft_tokens: int | None = None,
    ) -> Iterator[str]:
        """As ``generate`` for one prompt; yields text in pieces of whole characters, without stop strings."""
        sampling = Sampling(max_new_tokens, temperature, top_p, stop_strings(stop))
        return make_decoder(self, [prompt], [image], sampling, seed, truncate, num_draft_tokens).stream()

    def chat(
        self,
        messages: str | Sequence[Message],
        image: ImageInput | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        truncate: Literal["left"] | None = None,
    ) -> str:
        """Answer the last message of a conversation.

        Args:
            messages: ``[{"role": "user", "content": "What is this?"}, ...]``, user and assistant alternating; a string
                is a single question.
            image: The image to discuss.
            max_new_tokens: Maximum length of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            seed: Random seed for sampling.
            truncate: See ``generate``.

        Raises:
            DataError: The roles are out of order; or as ``generate``.
        """
        prompt, stop = self.chat_prompt(messages)
        [answer] = self.generate([prompt], [image], max_new_tokens, temperature, top_p, stop, seed, truncate)
        return answer.text.strip()

    def chat_prompt(self, messages: str | Sequence[Message], answer_start: str = "") -> tuple[str, tuple[str, ...]]:
        """Format the conversation with the model's template; returns the prompt and the stop strings.

        Args:
            messages: As in ``chat``.
            answer_start: Beginning of the answer, appended to the prompt.
        Raises:
            DataError: The model has no template, or the roles are out of order.
        """
        if self.conversation is None:
            raise DataError("this model has no conversation template: set model.conversation, or use generate")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        check_messages(messages, "chat", last="user")
        return self.conversation.prompt(messages, answer_start), self.conversation.stop

    def ask(
        self,
        task: str | Task[Any, Any] | TaskQuestion,
        image: ImageInput,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        truncate: Literal["left"] | None = None,
        num_draft_tokens: int | None = None,
        **fields: Any,
    ) -> TaskAnswer:
        """Ask a task's question about an image and parse the answer.

        Args:
            task: A task of ``formatters.tasks``, the name of a task, or a finished question.
            image: The image; not pixels or tokens, because the original size is needed.
            max_new_tokens: Maximum length of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            stop: Strings that end the answer; None: the template's.
            seed: Random seed for sampling.
            truncate: See ``generate``.
            num_draft_tokens: See ``generate``.
            fields: Values for the question: ``phrase="the red circle"`` (rec), ``category="dog"`` (detection),
                ``question="How many?"`` (vqa), ``box=Box(...)`` (pose, reg).

        Returns:
            The answer and its parsed items, in pixels of the image.

        Raises:
            RegistryError: There is no such task.
            DataError: A field is missing or refused; or as ``generate``.
        """
        picture, question = read_question(task, image, fields)
        prompt, ends = self.chat_prompt(question.text, question.task.answer_start)
        [answer] = self.generate(
            [prompt],
            [picture],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=ends if stop is None else stop,
            seed=seed,
            truncate=truncate,
            num_draft_tokens=num_draft_tokens,
        )
        return TaskAnswer(question, prompt, answer, question.parse(answer.text))

    def session(
        self, image: ImageInput | None = None, system: str | None = None, num_draft_tokens: int | None = None
    ) -> ChatSession:
        """Start a chat session. It keeps the KV cache between turns and encodes the image once.

        Args:
            image: The image to discuss.
            system: Replaces the template's system text.
            num_draft_tokens: See ``generate``.

        Raises:
            DataError: The model has no template or tokenizer, or the image cannot be read.
        """
        return ChatSession(self, image, system, num_draft_tokens)

    def embed_prompts(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Sequence[ImageInput | None] | None = None,
        truncate: Literal["left"] | None = None,
        max_new_tokens: int = 1,
    ) -> list[Prompt]:
        """Embed prompts with their images. All texts are checked first.

        Args:
            prompts: As in ``generate``.
            images: As in ``generate``.
            truncate: As in ``generate``.
            max_new_tokens: Positions that truncation reserves for the answer.

        Raises:
            DataError: As ``generate``.
        """
        return embed_prompts(self, prompts, images, truncate, max_new_tokens)

    def score(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        images: Sequence[ImageInput | None] | None = None,
    ) -> list[Score]:
        """Log-likelihood of each continuation after its context.

        Context and continuation are tokenised as one text. The first ``n`` tokens are not scored, where ``n`` is the
        length of the context tokenised alone.

        Args:
            contexts: Raw text before the continuation.
            continuations: Raw text, with its own leading space.
            images: One image or None per row; or None for no images.

        Raises:
            DataError: The lists differ in length, a continuation has no tokens, or a row exceeds the context.
        Source: LLaMA2-Accessory, accessory/model/meta.py, evaluate_examples.
        """
        return scoring.score(self, contexts, continuations, images)

    # -- disk ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a sphinxkit directory: safetensors, recipe.yaml and the tokenizer's files; ``sphinxkit.load`` reads it.

        Args:
            path: Directory to create. It becomes visible only when complete.
            overwrite: Replace an existing checkpoint at ``path``.

        Raises:
            CheckpointError: The model was built without a recipe, or ``path`` exists.
        """
        from sphinxkit import checkpoint
        from sphinxkit.tensor_source import ModuleSource

        if self.recipe_yaml is None:
            raise CheckpointError(
                "this model was assembled by hand: set model.recipe_yaml to the recipe that builds it, so that the "
                "saved directory can be loaded again"
            )
        checkpoint.save(
            path,
            ModuleSource(self),
            recipe_yaml=self.recipe_yaml,
            tokenizer=None if self.tokenizer is None else self.tokenizer.files,
            overwrite=overwrite,
        )
