"""SphinxModel: a language model with eyes. Takes built parts; knows no configuration and no names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit.errors import CheckpointError, DataError, ShapeError
from sphinxkit.generation import Decoder, Generation, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.formatters import ConversationTemplate
    from sphinxkit.llama import LlamaModel
    from sphinxkit.tokenizer import Tokenizer
    from sphinxkit.vision_tower import VisionTower

IGNORE_INDEX = -100  # torch's own default for cross entropy


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is.

    Args:
        log_likelihood: Sum over its tokens, natural logarithm.
        num_tokens: How many they are.
        is_greedy: Whether greedy decoding would have written exactly these tokens.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool

    @property
    def mean_nll(self) -> float:
        """Negative log-likelihood per token; its exponential is the perplexity."""
        return -self.log_likelihood / self.num_tokens


class SphinxModel(nn.Module):
    """SPHINX: visual tokens stand right after the first token of the text.

    Args:
        llm: The language model.
        vision: Turns pixels into tokens of the language model's width; None for text alone.
        tokenizer: Needed by everything that takes or gives text.
        conversation: The template of ``chat``.
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
        recipe_yaml: str | None = None,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.vision = vision
        self.tokenizer = tokenizer
        self.conversation = conversation
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

    def _need_vision(self) -> VisionTower:
        if self.vision is None:
            raise DataError("this model has no vision tower: it takes text alone")
        return self.vision

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise DataError("this model has no tokenizer: set model.tokenizer = Tokenizer(path)")
        return self.tokenizer

    # -- images -------------------------------------------------------------------------------------------------------

    def preprocess(self, images: Image | str | Path | Sequence[Image | str | Path]) -> Tensor:
        """Pad, resize and normalise images.

        Args:
            images: A PIL image or a path, or several. Files are opened by ``tilers.load_image`` (turned upright).

        Shape:
            return: (B, 3, S, S) float32 on the CPU, CLIP-normalised
        Raises:
            DataError: An image cannot be read.
        """
        from sphinxkit.tilers import load_image, preprocess

        several = [images] if not isinstance(images, Sequence) or isinstance(images, str) else list(images)
        opened = [load_image(image) if isinstance(image, str | Path) else image for image in several]
        return preprocess(opened, self._need_vision().image_size)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Visual tokens: every view's [start, tokens, end], ready to follow the first token of the text.

        Args:
            pixels: From ``preprocess``.

        Shape:
            pixels: (B, 3, S, S)
            return: (B, N_img, D) in the language model's dtype
        Raises:
            ShapeError: The pixels have another size.
        """
        tokens: Tensor = self._need_vision()(pixels.to(self.device))
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
        logits: Tensor = self.llm.lm_head(self._hidden(token_ids, pixels, image_rows, seq_lens))
        return logits

    def _hidden(
        self,
        token_ids: Tensor,
        pixels: Tensor | None,
        image_rows: Sequence[int] | None,
        seq_lens: Sequence[int] | None,
    ) -> Tensor:
        """Hidden states (B, S, D) that predict the next text token."""
        if token_ids.ndim != 2:
            raise ShapeError(f"token_ids: expected (B, S), got {tuple(token_ids.shape)}")
        token_ids = token_ids.to(self.device)
        if seq_lens is not None:
            seq_lens = [int(length) for length in seq_lens]
            if token_ids.shape[0] != 1 or sum(seq_lens) != token_ids.shape[1] or min(seq_lens, default=0) < 1:
                raise ShapeError(
                    f"packed samples: seq_lens {seq_lens} (sum {sum(seq_lens)}) must be positive and fill the single "
                    f"row of token_ids {tuple(token_ids.shape)}"
                )
        text: Tensor = self.llm.embed(token_ids)
        if pixels is None:
            if image_rows:
                raise ShapeError(f"image_rows {list(image_rows)} without pixels")
            return self.llm.hidden_states(text, seq_lens=seq_lens)
        num_rows = token_ids.shape[0] if seq_lens is None else len(seq_lens)
        rows = _check_rows(image_rows, num_rows, len(pixels))
        images = self.encode_images(pixels)
        if seq_lens is None and rows == list(range(num_rows)):
            joined = torch.cat([text[:, :1], images, text[:, 1:]], dim=1)
            return self.llm.hidden_states(joined)[:, images.shape[1] :]
        return self._hidden_of_some(text, images, rows, seq_lens)

    def _hidden_of_some(self, text: Tensor, images: Tensor, rows: list[int], seq_lens: list[int] | None) -> Tensor:
        """As ``_hidden`` when some rows have no image, or samples are packed: everything becomes one packed row."""
        num_slots = images.shape[1]
        lengths = [text.shape[1]] * text.shape[0] if seq_lens is None else seq_lens
        image_of = {row: image for image, row in enumerate(rows)}
        parts, wanted, packed_lens, position = [], [], [], 0
        for row, sample in enumerate(torch.split(text.flatten(0, 1), lengths)):
            if row in image_of:
                parts += [sample[:1], images[image_of[row]], sample[1:]]
                skipped = num_slots
            else:
                parts.append(sample)
                skipped = 0
            wanted.append(torch.arange(position + skipped, position + skipped + lengths[row], device=text.device))
            packed_lens.append(lengths[row] + skipped)
            position += lengths[row] + skipped
        hidden = self.llm.hidden_states(torch.cat(parts)[None], seq_lens=packed_lens)
        return hidden[0, torch.cat(wanted)].view_as(text)

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
        if labels.shape != token_ids.shape:
            raise ShapeError(f"labels {tuple(labels.shape)} do not match token_ids {tuple(token_ids.shape)}")
        hidden = self._hidden(token_ids, pixels, image_rows, seq_lens)[:, :-1]
        targets = labels[:, 1:].to(self.device)
        if seq_lens is not None:  # a sample's first token is not the continuation of the sample before it
            starts = torch.tensor(seq_lens[:-1], device=self.device, dtype=torch.long).cumsum(0) - 1
            targets = targets.index_fill(1, starts, IGNORE_INDEX)
        learnt = targets != IGNORE_INDEX
        count = learnt.sum()
        if count == 0:
            total = self.llm.lm_head(hidden[:, :1]).float().sum() * 0.0
        else:
            logits = self.llm.lm_head(hidden[learnt])
            total = F.cross_entropy(logits.float(), targets[learnt], reduction="sum")
        return (total, count) if reduction == "none" else total / count.clamp(min=1)

    # -- text ---------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Image | str | Path | Sequence[Image | str | Path | None] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = ("\n###",),
        seed: int | None = None,
        truncate: Literal["left"] | None = None,
    ) -> list[Generation]:
        r"""Continue prompts of any lengths, each with an image or without.

        Args:
            prompts: Raw text; the beginning-of-sentence token is added, no template is applied.
            images: One for each prompt, None where a prompt has none; or None.
            max_new_tokens: For each row.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            stop: Strings that end an answer.
            seed: Of the sampling.
            truncate: "left" drops text after the beginning-of-sentence token (and the image) until an over-long prompt
                fits; None makes such a prompt an error.

        Returns:
            One ``Generation`` for each prompt, in order.

        Raises:
            DataError: Empty or over-long prompts, more images than prompts or fewer, an image that cannot be read.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop), seed)
        return self._decoder(prompts, images, sampling, truncate).run()

    def stream(
        self,
        prompt: str,
        image: Image | str | Path | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = ("\n###",),
        seed: int | None = None,
        truncate: Literal["left"] | None = None,
    ) -> Iterator[str]:
        """As ``generate`` for one prompt, piece by piece: never half a character, never a part of a stop string."""
        sampling = Sampling(max_new_tokens, temperature, top_p, tuple(stop), seed)
        return self._decoder([prompt], [image], sampling, truncate).stream()

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        image: Image | str | Path | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Answer the last message of a conversation.

        Args:
            messages: ``[{"role": "user", "content": "What is this?"}, ...]``, user and assistant in turn.
            image: What it is about.
            max_new_tokens: Of the answer.
            temperature: 0 is greedy.
            top_p: See ``generation.Sampling``.
            seed: Of the sampling.

        Raises:
            DataError: The roles are out of order; or as ``generate``.
        """
        prompt, stop = self.chat_prompt(messages)
        [answer] = self.generate([prompt], [image], max_new_tokens, temperature, top_p, stop, seed)
        return answer.text.strip()

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, tuple[str, ...]]:
        """The conversation as a prompt in the model's template, and the strings that end the answer."""
        if self.conversation is None:
            raise DataError("this model has no conversation template: set model.conversation, or use generate")
        return self.conversation.prompt(messages), self.conversation.stop

    def _decoder(
        self,
        prompts: str | Sequence[str],
        images: Any,
        sampling: Sampling,
        truncate: Literal["left"] | None,
    ) -> Decoder:
        """Check everything before any work is done, then embed the prompts."""
        tokenizer = self._need_tokenizer()
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise DataError("generate: there are no prompts")
        if truncate not in (None, "left"):
            raise DataError(f"truncate must be None or 'left', got {truncate!r}")
        pictures = _check_images(images, len(prompts))
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"prompt {row} is empty" if isinstance(prompt, str) else f"prompt {row} is not text")
        token_ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
        num_slots = self._need_vision().num_tokens if any(picture is not None for picture in pictures) else 0
        for row, ids in enumerate(token_ids):
            slots = num_slots if pictures[row] is not None else 0
            room = self.llm.max_seq_len - 1 - slots  # at least one token is to be written
            if len(ids) > room and truncate == "left":
                token_ids[row] = ids[:1] + ids[len(ids) - room + 1 :]
            elif len(ids) > room:
                raise DataError(
                    f"prompt {row} has {len(ids)} tokens and {slots} image tokens, but the context holds "
                    f"{self.llm.max_seq_len}, one of them for the answer; shorten it or pass truncate='left'"
                )
        with torch.no_grad():
            rows = [row for row, picture in enumerate(pictures) if picture is not None]
            tokens = self.encode_images(self.preprocess([pictures[row] for row in rows])) if rows else None
            embedded = []
            for row, ids in enumerate(token_ids):
                text = self.llm.embed(torch.tensor(ids, device=self.device))
                if row in rows and tokens is not None:
                    text = torch.cat([text[:1], tokens[rows.index(row)], text[1:]])
                embedded.append(text)
        return Decoder(self.llm, tokenizer, embedded, sampling)

    @torch.no_grad()
    def score(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        images: Sequence[Image | str | Path | None] | None = None,
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
        tokenizer = self._need_tokenizer()
        if len(contexts) != len(continuations) or not contexts:
            raise DataError(f"score: {len(contexts)} contexts but {len(continuations)} continuations")
        pictures = _check_images(images, len(contexts))
        scores = []
        for row, (context, continuation, picture) in enumerate(zip(contexts, continuations, pictures, strict=True)):
            ids = tokenizer.encode(context + continuation, bos=True)
            start = len(tokenizer.encode(context, bos=True))
            if start >= len(ids):
                raise DataError(f"score: continuation {row} {continuation!r} adds no token to its context")
            pixels = None if picture is None else self.preprocess([picture])
            slots = 0 if picture is None else self._need_vision().num_tokens
            if len(ids) + slots > self.llm.max_seq_len:
                raise DataError(
                    f"score: row {row} has {len(ids)} tokens and {slots} image tokens, but the context holds "
                    f"{self.llm.max_seq_len}"
                )
            token_ids = torch.tensor([ids], device=self.device)
            hidden = self._hidden(token_ids, pixels, None, None)[0, start - 1 : -1]
            log_probs = torch.log_softmax(self.llm.lm_head(hidden).float(), dim=-1)
            targets = token_ids[0, start:]
            chosen = log_probs.gather(-1, targets[:, None]).sum()
            is_greedy = bool((log_probs.argmax(-1) == targets).all())
            scores.append(Score(float(chosen), len(targets), is_greedy))
        return scores

    # -- disk ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a sphinxkit directory: safetensors, recipe.yaml and tokenizer.model; ``sphinxkit.load`` reads it.

        Args:
            path: Of the directory; it appears when it is complete.
            overwrite: Whether an existing checkpoint there may be replaced.

        Raises:
            CheckpointError: The model was assembled by hand and has no recipe; or ``path`` exists.
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
            tokenizer=None if self.tokenizer is None else self.tokenizer.to_bytes(),
            overwrite=overwrite,
        )


def _check_rows(image_rows: Sequence[int] | None, num_rows: int, num_images: int) -> list[int]:
    rows = list(range(num_rows)) if image_rows is None else [int(row) for row in image_rows]
    if len(rows) != num_images:
        raise ShapeError(f"{num_images} images for {len(rows)} rows (image_rows {rows})")
    if len(set(rows)) != len(rows) or any(not 0 <= row < num_rows for row in rows):
        raise ShapeError(f"image_rows {rows}: each must be one of the {num_rows} rows, and none twice")
    return rows


def _check_images(images: Any, num_prompts: int) -> list[Any]:
    if images is None:
        return [None] * num_prompts
    several = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    if len(several) != num_prompts:
        raise DataError(f"{len(several)} images for {num_prompts} prompts; give one each, None where there is none")
    return several
