"""SphinxModel: a language model that reads images. Takes built parts; knows no configuration and no names."""

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
    """SPHINX: visual tokens stand right after the first token of the text.

    Args:
        llm: The language model.
        vision: Turns pixels into tokens of the language model's width; None for text alone.
        tokenizer: Needed by everything that takes or gives text.
        conversation: The template of ``chat``.
        end_ids: Ids that end an answer, beside the tokenizer's end-of-sentence (end of turn, tokens that were added).
        recipe_yaml: What ``save`` writes beside the weights so that ``sphinxkit.load`` can assemble the model again.

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
        self.end_ids = tuple(end_ids)
        self.recipe_yaml = recipe_yaml

    # -- what the model is --------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llm.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.llm.embed_tokens.weight.dtype

    def require_vision(self) -> VisionTower:
        """The vision tower; a DataError where there is none."""
        if self.vision is None:
            raise DataError("this model has no vision tower: it takes text alone")
        return self.vision

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; a DataError where there is none."""
        if self.tokenizer is None:
            raise DataError("this model has no tokenizer: set model.tokenizer = Tokenizer(path)")
        return self.tokenizer

    def accelerate(self, mode: Literal["auto", "compile"] | None = "auto") -> None:
        """Choose how text is generated.

        Hooks, adapters and replaced weights send generation through the plain modules by themselves, and training never
        leaves them. In float32 greedy text and seeded samples are the same in every mode; in 16 bit logits agree within
        rounding.

        Args:
            mode: "auto" joins projections, and on a CPU compiles a kernel for few rows, when the first text is
                generated: about a second for a large model. "compile" adds ``torch.compile``, which takes minutes at
                first. None: the modules as they are.

        Raises:
            DataError: Another mode, or "compile" for another library's language model.
            RegistryError: "compile" cannot run here, or not with the model's attention backend.
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
            images: One or several: PIL images, paths, bytes, binary files or uint8 arrays (H, W, 3). All are turned
                upright, as their EXIF orientation says.

        Shape:
            return: (B, 3, S, S) float32 on the CPU, CLIP-normalised
        Raises:
            DataError: An image cannot be read.
        """
        from sphinxkit.tilers import preprocess

        return preprocess(images, self.require_vision().image_size)

    def encode_images(self, pixels: Tensor, max_views: int | None = None) -> Tensor:
        """Visual tokens: every view's [start, tokens, end], ready to follow the first token of the text.

        Args:
            pixels: From ``preprocess``.
            max_views: An encoder runs on at most this many views at once, which bounds its memory; None: on all.

        Shape:
            pixels: (B, 3, S, S)
            return: (B, N_img, D) in the language model's dtype
        Raises:
            ShapeError: The pixels have another size, or ``max_views`` is not positive.
        """
        tokens: Tensor = self.require_vision()(to_device(pixels, self.device), max_views)
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
            token_ids: Right-padded rows; or one row of packed samples, with ``seq_lens``.
            pixels: Images, from ``preprocess``.
            image_rows: Which row (or packed sample) each image belongs to; None: one image for every row, in order.
            seq_lens: Text lengths of the samples packed into a single row; they do not see each other.

        Shape:
            token_ids: (B, S) int64
            pixels: (number of images, 3, S_img, S_img)
            return: (B, S, vocab); i predicts token i + 1; with an image, position 0 is read at its last slot
        Raises:
            ShapeError: Rows, images and lengths do not fit each other.
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
        """Cross entropy of the labelled tokens; logits are computed where there is a label and nowhere else.

        Args:
            token_ids: As in ``forward``.
            labels: Aligned to ``token_ids``; -100 where nothing is to be learnt.
            pixels: As in ``forward``.
            image_rows: As in ``forward``.
            seq_lens: As in ``forward``.
            reduction: "mean" over the labelled tokens, or "none" for (sum, count), to be weighted by tokens across
                batches.

        Shape:
            token_ids, labels: (B, S)
            return: scalar; with "none" two scalars. Nothing labelled: 0, still connected to the graph.
        Raises:
            ShapeError: As ``forward``; or labels of another shape.
        """
        if reduction not in ("mean", "none"):
            raise DataError(f"loss: reduction must be 'mean' or 'none', got {reduction!r}")
        if labels.shape != token_ids.shape:
            raise ShapeError(f"labels {tuple(labels.shape)} do not match token_ids {tuple(token_ids.shape)}")
        hidden = self._hidden_states(token_ids, pixels, image_rows, seq_lens)
        total, count = multimodal.loss_sums(self.llm, hidden, labels, seq_lens)
        return (total, count) if reduction == "none" else total / count.clamp(min=1)

    def _hidden_states(
        self,
        token_ids: Tensor,
        pixels: Tensor | None,
        image_rows: Sequence[int] | None,
        seq_lens: Sequence[int] | None,
    ) -> Tensor:
        images = None if pixels is None or len(pixels) == 0 else self.encode_images(pixels)
        return multimodal.hidden_states(self.llm, token_ids, images, image_rows, seq_lens)

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
        r"""Continue prompts of any lengths, each with an image or without.

        Args:
            prompts: Raw text; the beginning-of-sentence token is added, no template is applied. A text may be empty
                where there is an image.
            images: One for each prompt, None where a prompt has none; or None. See ``ImageInput`` for what may stand
                for an image; the same image given several times is encoded once.
            max_new_tokens: For each row.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            stop: Strings that end an answer.
            seed: Of the sampling. A number holds for each prompt alone, so a prompt's answer does not depend on the
                others (equal prompts have equal answers); a sequence has one seed for each prompt.
            truncate: "left" drops text behind the beginning-of-sentence token until prompt, image and
                ``max_new_tokens`` fit into the context. None: an answer ends where the context ends, and a prompt that
                leaves no room for one is an error.
            num_draft_tokens: Draft up to this many tokens by prompt lookup; see ``generation.Decoder``.

        Returns:
            One ``Generation`` for each prompt, in order.

        Raises:
            DataError: Empty or over-long prompts, more images or seeds than prompts or fewer, an image that cannot be
                read, or logits that are not finite.
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
        """As ``generate`` for one prompt, piece by piece: never half a character, never a part of a stop string."""
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
            messages: ``[{"role": "user", "content": "What is this?"}, ...]``, user and assistant in turn; a text is a
                single question.
            image: What it is about.
            max_new_tokens: Of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            seed: Of the sampling.
            truncate: See ``generate``.

        Raises:
            DataError: The roles are out of order; or as ``generate``.
        """
        prompt, stop = self.chat_prompt(messages)
        [answer] = self.generate([prompt], [image], max_new_tokens, temperature, top_p, stop, seed, truncate)
        return answer.text.strip()

    def chat_prompt(self, messages: str | Sequence[Message], answer_start: str = "") -> tuple[str, tuple[str, ...]]:
        """The conversation as a prompt in the model's template, and the strings that end the answer.

        Args:
            messages: As in ``chat``.
            answer_start: Words that the prompt already gives of the answer.
        Raises:
            DataError: No template, or the roles are out of order.
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
        """Ask a task's question about an image, and read the answer.

        Args:
            task: A task of ``formatters.tasks``, its name, or a question that is worded already.
            image: What it is about; not pixels or tokens, which do not tell the image's own size.
            max_new_tokens: Of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            stop: Strings that end the answer; None: the template's.
            seed: Of the sampling.
            truncate: See ``generate``.
            num_draft_tokens: See ``generate``.
            fields: What the task asks about: ``phrase="the red circle"`` (rec), ``category="dog"`` (detection),
                ``question="How many?"`` (vqa), ``box=Box(...)`` (pose, reg).

        Returns:
            The answer, and what it says in pixels of the image.

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
        """A conversation that continues: each question costs its own tokens, an image is encoded once.

        Args:
            image: What it is about.
            system: Replaces the template's system text.
            num_draft_tokens: See ``generate``.

        Raises:
            DataError: No template, no tokenizer, or an image that cannot be read.
        """
        return ChatSession(self, image, system, num_draft_tokens)

    def embed_prompts(
        self,
        prompts: str | Sequence[str],
        images: ImageInput | Sequence[ImageInput | None] | None = None,
        truncate: Literal["left"] | None = None,
        max_new_tokens: int = 1,
    ) -> list[Prompt]:
        """Prompts as the language model reads them; their text is checked before any work is done.

        Args:
            prompts: As in ``generate``.
            images: As in ``generate``.
            truncate: As in ``generate``.
            max_new_tokens: Positions that truncating leaves for the answer.

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

        The context and its continuation are tokenised as one text; what is scored are the tokens beyond as many as the
        context has by itself.

        Args:
            contexts: Raw text before the continuation.
            continuations: Raw text, with its own leading space.
            images: One for each row, None where a row has none; or None.

        Raises:
            DataError: Lists of different lengths, a continuation without tokens, or a row longer than the context.
        Source: LLaMA2-Accessory, accessory/model/meta.py, evaluate_examples.
        """
        return scoring.score(self, contexts, continuations, images)

    # -- disk ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a sphinxkit directory: safetensors, recipe.yaml and the tokenizer's files; ``sphinxkit.load`` reads it.

        Args:
            path: Of the directory; it appears when it is complete.
            overwrite: Whether an existing checkpoint there may be replaced.

        Raises:
            CheckpointError: The model was assembled without a recipe; or ``path`` exists.
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
