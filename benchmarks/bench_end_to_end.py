"""A photograph and a question: time to the first token, to an answer, and to the next question, whole models."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import sphinxkit
from benchmarks import bench_encoders, llama_twins, released_layout
from benchmarks.bench_tilers import photograph
from benchmarks.harness import Case, Context, Sample, Work, build_random, count_flops, nbytes
from sphinxkit.tokenizer import Tokenizer

PROMPT = "### Human: What is in this image, and where is it?\n### Assistant:"
FIRST_QUESTION = "What is in this image, and where is it?"
ANOTHER_QUESTION = "Is there anything written on it?"
SECOND_QUESTION = "What colour is the largest of the things in it, and what stands to its left?"
# What each kind of candidate does with an image and a number of tokens: token ids.
Answer = Callable[[Image.Image, int], Tensor]


def cases(context: Context) -> Iterator[Case]:
    runs = context.on(
        [("sphinx_1k_13b", torch.bfloat16), ("sphinx_tiny_1k", torch.bfloat16)],
        [("sphinx_tiny_1k", torch.bfloat16)],
        [("sphinx_micro", torch.float32)],
    )
    for recipe, dtype in runs:
        model = build_random(lambda name=recipe: sphinxkit.build(name, device="meta"), context.device, dtype)
        if model.tokenizer is None:
            model.tokenizer = _tokenizer(model.llm.vocab_size)
        with torch.no_grad():
            model.llm.lm_head.weight[model.tokenizer.eos_id] = 0  # no answer ends early: some logit is above 0
        model.accelerate("auto")
        model.generate("?", max_new_tokens=1)  # joins the weights before the twins are made, which share them
        yield from _answers(context, recipe, model)
        yield _second_question(context, recipe, model)
        del model


def _tokenizer(vocab_size: int) -> Tokenizer:
    small = (released_layout.GOLDEN / "llama_ens_light" / "tokenizer.model").read_bytes()
    return Tokenizer(released_layout.pad_tokenizer(small, Tokenizer(small).vocab_size, vocab_size))


def _answers(context: Context, recipe: str, model: Any) -> Iterator[Case]:
    """Time to the first token, then whole answers."""
    images = [(photograph(*context.pick((1920, 1080), (64, 36)), seed=seed),) for seed in range(2)]
    clock = _Clock(context)
    calls: dict[str, Answer] = {"sphinxkit": _ours(model, clock)}
    missing = ""
    try:
        visual = _public_visual(model, clock)
        calls["eager, as the public code"] = _public(model, visual, clock)
        calls["open_clip, timm, transformers"] = _transformers(model, visual, clock)
    except ImportError as error:
        missing = str(error)
    if missing:
        yield Case(f"{recipe}: upstream libraries", skip=missing)
    # the same greedy tokens in float32; in 16 bit the ways part where two tokens are nearly as likely
    tolerance = 0 if model.dtype == torch.float32 else None
    flops, dtype = _flops(model), str(model.dtype).removeprefix("torch.")
    views = model.vision.tiler.num_views
    positions = model.vision.num_tokens + len(model.tokenizer.encode(PROMPT, bos=True))
    for new in (1, context.on(128, 32, 4)):
        name = "time to first token" if new == 1 else f"answer of {new} tokens"
        timed = {
            label: _timed(context, clock, lambda image, call=call, new=new: call(image, new), new, flops)
            for label, call in calls.items()
        }
        yield Case(
            f"{recipe}, {name}, {views} views, {positions} positions, {dtype}",
            timed,
            Work(flops, nbytes(model.vision) + llama_twins.weight_bytes(model.llm) * new, dtype=model.dtype),
            images,
            amount=new,
            unit="tokens",
            tolerance=tolerance,
            repeats=context.on(5, 3 if new == 1 else 2, None),
            max_seconds=context.on(30, 240, 60),
        )


class _Clock:
    """When the parts of the call that runs were ready; on a GPU it waits for them."""

    def __init__(self, context: Context) -> None:
        self._cuda = context.device.type == "cuda"
        self.moments: dict[str, float] = {}

    def note(self, name: str) -> None:
        """Only the first time of a call counts."""
        if name not in self.moments:
            if self._cuda:
                torch.cuda.synchronize()
            self.moments[name] = time.perf_counter()


def _timed(
    context: Context, clock: _Clock, call: Callable[[Image.Image], Tensor], new: int, flops: float
) -> Callable[[Image.Image], Sample]:
    def timed(image: Image.Image) -> Sample:
        clock.moments = {}
        begin, cpu_begin = time.perf_counter(), time.process_time()
        tokens = call(image).cpu()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
        if len(tokens) != new and not context.micro:
            raise RuntimeError(f"{len(tokens)} tokens instead of {new}: the random weights ended the answer")
        image_ready, first = clock.moments["visual tokens"] - begin, clock.moments["first logits"] - begin
        extra = {"visual tokens s": image_ready, "prefill s": first - image_ready, "first token s": first}
        if new > 1:
            extra["tokens/s after the first"] = (len(tokens) - 1) / (seconds - first)
        else:
            extra["TFLOP/s"] = flops / seconds / 1e12
        return Sample(seconds, output=tokens, extra=extra, cpu_seconds=cpu if context.device.type == "cpu" else None)

    return timed


class _Hooks(AbstractContextManager[None]):
    """Tells the clock when a module has its output."""

    def __init__(self, clock: _Clock, modules: Mapping[str, torch.nn.Module]) -> None:
        self._clock, self._modules = clock, modules

    def __enter__(self) -> None:
        self._handles = [
            module.register_forward_hook(lambda *_, label=label: self._clock.note(label))
            for label, module in self._modules.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _ours(model: Any, clock: _Clock) -> Answer:
    def call(image: Image.Image, count: int) -> Tensor:
        # not lm_head: a hook there sends the text through the plain modules; it takes some milliseconds
        with _Hooks(clock, {"visual tokens": model.vision, "first logits": model.llm.norm}):
            [answer] = model.generate([PROMPT], [image], max_new_tokens=count, stop=())
        return torch.tensor(answer.token_ids)

    return call


def _public_visual(model: Any, clock: _Clock) -> Callable[[Image.Image], Tensor]:
    """The visual tokens of the same weights through upstream libraries, one encoder after the other."""
    vision = model.vision
    calls = [[bench_encoders.COMPETITORS[e.name][1](e) for e in branch.encoders] for branch in vision.branches]

    def visual(image: Image.Image) -> Tensor:
        pixels = model.preprocess([image]).to(model.device)
        views = {size: tensor.flatten(0, 1) for size, tensor in vision.views(pixels).items()}
        parts = []
        for branch, functions in zip(vision.branches, calls, strict=True):
            sequences = [call(views[size]) for call, size in zip(functions, branch.tile_sizes, strict=True)]
            longest = max(sequence.shape[1] for sequence in sequences)
            sequences = [_repeated(sequence, longest) for sequence in sequences]
            parts.append(branch.projector(torch.cat(sequences, dim=-1)))
        tokens = torch.cat(parts, dim=1)
        start, end = (token.expand(tokens.shape[0], -1, -1) for token in (vision.start_token, vision.end_token))
        tokens = torch.cat([start, tokens, end], dim=1).flatten(0, 1)[None]
        clock.note("visual tokens")
        return tokens

    return visual


def _repeated(sequence: Tensor, length: int) -> Tensor:
    """A prefix and a square map, the map's cells repeated until the sequence has ``length`` tokens."""
    if sequence.shape[1] == length:
        return sequence
    side, wanted = round((sequence.shape[1] - 1) ** 0.5), round((length - 1) ** 0.5)
    grid = sequence[:, 1:].unflatten(1, (side, side))
    grid = grid.repeat_interleave(wanted // side, dim=1).repeat_interleave(wanted // side, dim=2)
    return torch.cat([sequence[:, :1], grid.flatten(1, 2)], dim=1)


class _Embedded:
    """A language model whose embedding lets embeddings through, for loops that take tokens only."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.is_floating_point() else self._llm.embed_tokens(tokens)


def _public(model: Any, visual: Callable[[Image.Image], Tensor], clock: _Clock) -> Answer:
    """One operator at a time, a new cache of full length for every answer, a wait after every token."""
    llm, tokenizer = model.llm, model.tokenizer

    def call(image: Image.Image, count: int) -> Tensor:
        ids = torch.tensor([tokenizer.encode(PROMPT, bos=True)], device=model.device)
        text = llm.embed_tokens(ids)
        embeds = torch.cat([text[:, :1], visual(image).to(text.dtype), text[:, 1:]], dim=1)
        step = llama_twins.public_loop(_Embedded(llm), 1, llm.max_seq_len)  # type: ignore[arg-type]
        logits = step(embeds, 0)
        clock.note("first logits")
        written: list[int] = []
        while True:
            token = int(logits[0, -1].argmax())
            if token == tokenizer.eos_id:
                break
            written.append(token)
            if len(written) == count:
                break
            logits = step(torch.tensor([[token]], device=model.device), embeds.shape[1] + len(written) - 1)
        return torch.tensor(written)

    return call


def _transformers(model: Any, visual: Callable[[Image.Image], Tensor], clock: _Clock) -> Answer:
    twin = llama_twins.transformers_twin(model.llm)
    tokenizer = model.tokenizer

    def call(image: Image.Image, count: int) -> Tensor:
        ids = torch.tensor([tokenizer.encode(PROMPT, bos=True)], device=model.device)
        text = twin.model.embed_tokens(ids)
        embeds = torch.cat([text[:, :1], visual(image).to(text.dtype), text[:, 1:]], dim=1)
        with _Hooks(clock, {"first logits": twin.lm_head}):
            out = twin.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.eos_id,
            )
        written = out[0]
        return written[written != tokenizer.eos_id]

    return call


def _vision_flops(model: Any) -> float:
    """Encoders and projectors on all views of an image."""
    vision = model.vision
    views = vision.tiler.num_views
    flops = 0.0
    for branch in vision.branches:
        for encoder in branch.encoders:
            side = encoder.input_size
            flops += count_flops(lambda encoder=encoder: _structure(encoder), (views, 3, side, side))
        weights = sum(parameter.numel() for parameter in branch.projector.parameters() if parameter.ndim == 2)
        flops += 2 * weights * branch.num_tokens(False) * views
    return flops


def _flops(model: Any) -> float:
    """Encoders, projectors and prefill up to the first token."""
    tokens = model.vision.num_tokens + len(model.tokenizer.encode(PROMPT, bos=True))
    return _vision_flops(model) + _prefill_flops(model.llm, tokens)


def _prefill_flops(llm: Any, tokens: int, before: int = 0) -> float:
    products = 2 * (llama_twins.num_weights(llm) * tokens + llm.lm_head.weight.numel())
    return products + llama_twins.attention_flops(llm, tokens, before)


def _structure(encoder: Any) -> Callable[[Tensor], object]:
    """The encoder on meta: its structure, no data."""
    nowhere = {id(p): torch.nn.Parameter(p.detach().to("meta"), False) for p in encoder.parameters()}
    return copy.deepcopy(encoder, nowhere).float()


def _second_question(context: Context, recipe: str, model: Any) -> Case:
    """The next question about the same image: on with the session, beside the whole conversation asked anew."""
    picture = photograph(*context.pick((1920, 1080), (64, 36)))
    length = context.pick(16, 2)
    sessions: list[Any] = []
    tokenizer = model.tokenizer

    def opened() -> Any:
        """A session after its first answer, which stands in the text and in the cache."""
        if not sessions:
            [tokens] = model.encode_images(model.preprocess(picture))
            session = model.session(tokens)
            session.ask(FIRST_QUESTION, max_new_tokens=length)
            sessions.append((session, list(session.messages), tokens))
        session, first_turn, _ = sessions[0]
        session.messages = list(first_turn)
        session.ask(ANOTHER_QUESTION, max_new_tokens=1)  # the cache must not hold the question that is timed
        session.messages = list(first_turn)
        return session

    def conversation() -> list[dict[str, str]]:
        return [*opened().messages, {"role": "user", "content": SECOND_QUESTION}]

    def timed(call: Callable[[], str]) -> Sample:
        with context.timer() as timer:
            answer = call()
        return Sample(timer.seconds, None, answer, {}, timer.cpu_seconds)

    def goes_on() -> Sample:
        session = opened()
        read, reused = session.num_prefilled, session.num_reused
        sample = timed(lambda: session.ask(SECOND_QUESTION, max_new_tokens=1))
        sample.extra["positions read"] = session.num_prefilled - read
        sample.extra["positions reused"] = session.num_reused - reused
        return sample

    def anew() -> Sample:
        messages = conversation()
        return timed(lambda: model.chat(messages, picture, max_new_tokens=1))

    def same_features() -> Sample:
        messages = conversation()
        tokens = sessions[0][2]
        return timed(lambda: model.chat(messages, tokens, max_new_tokens=1))

    new = len(tokenizer.encode(SECOND_QUESTION)) + len(tokenizer.encode("### Human: \n### Assistant:"))
    held = model.vision.num_tokens + len(tokenizer.encode(PROMPT, bos=True)) + length
    return Case(
        f"{recipe}, second question, first token, {str(model.dtype).removeprefix('torch.')}",
        {"sphinxkit": goes_on, "features kept, all read again": same_features, "asked anew": anew},
        Work(_prefill_flops(model.llm, new, held), llama_twins.weight_bytes(model.llm), dtype=model.dtype),
        amount=1,
        unit="answers",
        tolerance=0 if model.dtype == torch.float32 else None,
        repeats=context.on(5, 3, None),
        max_seconds=context.on(30, 150, 60),
    )
