"""From a photograph and a question to the first token and to an answer: the whole model with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import sphinxkit
from benchmarks import bench_encoders, llama_twins, released_layout
from benchmarks.bench_tilers import photograph
from benchmarks.harness import Case, Context, Sample, Work, count_flops, nbytes
from sphinxkit.tokenizer import Tokenizer

PROMPT = "### Human: What is in this image, and where is it?\n### Assistant:"


def cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [("sphinx_1k_13b", torch.bfloat16), ("sphinx_tiny_1k", torch.bfloat16)],
        [("sphinx_tiny_1k", torch.bfloat16)],
        [("sphinx_micro", torch.float32)],
    )
    for recipe, dtype in runs:
        model = sphinxkit.build(recipe, device=context.device, dtype=dtype)
        if model.tokenizer is None:
            model.tokenizer = _tokenizer(model.llm.vocab_size)
        yield from _cases(context, recipe, model)
        del model


def _tokenizer(vocab_size: int) -> Tokenizer:
    small = (released_layout.GOLDEN / "llama_ens_light" / "tokenizer.model").read_bytes()
    return Tokenizer(released_layout.pad_tokenizer(small, Tokenizer(small).vocab_size, vocab_size))


def _cases(context: Context, recipe: str, model: Any) -> Iterator[Case]:
    new = context.on(128, 32, 4)
    images = [(photograph(*context.pick((1920, 1080), (64, 36)), seed=seed),) for seed in range(2)]
    plain, missing = None, ""
    try:
        plain = _plain(model)
    except ImportError as error:
        missing = str(error)
    if missing:
        yield Case(f"{recipe}: upstream libraries", skip=missing)

    def ours(image: Image.Image) -> Tensor:
        [answer] = model.generate([PROMPT], [image], max_new_tokens=new, stop=())
        return torch.tensor(answer.token_ids)

    candidates: dict[str, Callable[..., object]] = {"sphinxkit": _with_first_token(context, ours, model.llm.lm_head)}
    if plain is not None:
        call, head = plain
        candidates["open_clip, timm, transformers"] = _with_first_token(context, lambda image: call(image, new), head)
    yield Case(
        f"{recipe}, answer of {new} tokens, {str(model.dtype).removeprefix('torch.')}",
        candidates,
        _work(model, new),
        images,
        amount=new,
        unit="tokens",
        # the same greedy tokens in float32; in 16 bit the ways part where two tokens are nearly as likely
        tolerance=0 if model.dtype == torch.float32 else None,
        repeats=context.on(5, 2, None),
        max_seconds=300,
    )


def _with_first_token(
    context: Context, call: Callable[[Image.Image], Tensor], head: torch.nn.Module
) -> Callable[[Image.Image], Sample]:
    """Time the whole call, and note when the output layer first had its logits."""

    def timed(image: Image.Image) -> Sample:
        moments: list[float] = []

        def note(*_: object) -> None:
            if not moments:
                if context.device.type == "cuda":
                    torch.cuda.synchronize()
                moments.append(time.perf_counter())

        hook = head.register_forward_hook(note)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        try:
            tokens = call(image)
        finally:
            hook.remove()
        seconds, first = time.perf_counter() - begin, moments[0] - begin
        cpu = time.process_time() - cpu_begin if context.device.type == "cpu" else None
        extra = {"first token s": first, "tokens": len(tokens)}
        if len(tokens) > 1:
            extra["tokens/s after the first"] = (len(tokens) - 1) / (seconds - first)
        return Sample(seconds, output=tokens, extra=extra, cpu_seconds=cpu)

    return timed


def _work(model: Any, count: int) -> Work:
    """Encoders, projectors and prefill are arithmetic; every further token reads the language model once."""
    tiler, llm = model.vision.tiler, model.llm
    flops = 0
    for branch in model.vision.branches:
        for encoder in branch.encoders:
            side = encoder.input_size
            # the trunk on meta: a copy of the structure, no data
            flops += count_flops(lambda encoder=encoder: _structure(encoder), (tiler.num_views, 3, side, side))
    tokens = model.vision.num_tokens + len(model.tokenizer.encode(PROMPT, bos=True))
    flops += 2 * llama_twins.num_weights(llm) * tokens + llama_twins.attention_flops(llm, tokens)
    weights = llama_twins.weight_bytes(llm)
    return Work(flops, nbytes(model.vision) + weights * count, dtype=model.dtype)


def _structure(encoder: Any) -> Callable[[Tensor], object]:
    import copy

    twin = copy.deepcopy(
        encoder, {id(p): torch.nn.Parameter(p.detach().to("meta"), False) for p in encoder.parameters()}
    )
    return twin.float()


def _plain(model: Any) -> tuple[Callable[[Image.Image, int], Tensor], torch.nn.Module]:
    """The same weights through upstream libraries, part by part, as the public code strings them together.

    Returns:
        (image, number of tokens) -> token ids, and the output layer.
    """
    twin = llama_twins.transformers_twin(model.llm)
    vision, tokenizer = model.vision, model.tokenizer
    calls = [[bench_encoders.COMPETITORS[e.name][1](e) for e in branch.encoders] for branch in vision.branches]

    def visual(pixels: Tensor) -> Tensor:
        views = {size: tensor.flatten(0, 1) for size, tensor in vision.views(pixels).items()}
        parts = []
        for branch, functions in zip(vision.branches, calls, strict=True):
            sequences = [call(views[size]) for call, size in zip(functions, branch.tile_sizes, strict=True)]
            longest = max(sequence.shape[1] for sequence in sequences)
            sequences = [_repeated(sequence, longest) for sequence in sequences]
            parts.append(branch.projector(torch.cat(sequences, dim=-1)))
        tokens = torch.cat(parts, dim=1)
        start, end = (token.expand(tokens.shape[0], -1, -1) for token in (vision.start_token, vision.end_token))
        return torch.cat([start, tokens, end], dim=1).flatten(0, 1)[None]

    def call(image: Image.Image, count: int) -> Tensor:
        ids = torch.tensor([tokenizer.encode(PROMPT, bos=True)], device=model.device)
        text = twin.model.embed_tokens(ids)
        image_tokens = visual(model.preprocess([image]).to(model.device)).to(text.dtype)
        embeds = torch.cat([text[:, :1], image_tokens, text[:, 1:]], dim=1)
        out = twin.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        )
        return out[0].cpu()

    return call, twin.lm_head


def _repeated(sequence: Tensor, length: int) -> Tensor:
    """A prefix and a square map, the map's cells repeated until the sequence has ``length`` tokens."""
    if sequence.shape[1] == length:
        return sequence
    side, wanted = round((sequence.shape[1] - 1) ** 0.5), round((length - 1) ** 0.5)
    grid = sequence[:, 1:].unflatten(1, (side, side))
    grid = grid.repeat_interleave(wanted // side, dim=1).repeat_interleave(wanted // side, dim=2)
    return torch.cat([sequence[:, :1], grid.flatten(1, 2)], dim=1)
