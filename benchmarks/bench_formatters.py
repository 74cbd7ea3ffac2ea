"""Formatters: conversations to text and labels, detection answers written and read, beside plain Python.

The floor is the time that the text's bytes take at memory speed. Python is far above it whoever writes the code, so
"plain Python", which does the same without checks and repairs, is the candidate to compare with.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from benchmarks.harness import Case, Context, Work
from benchmarks.released_layout import GOLDEN
from sphinxkit.formatters import tasks
from sphinxkit.formatters.conversation import sphinx_v1
from sphinxkit.formatters.tasks import DetectionSample
from sphinxkit.geometry import Box, ImageGeometry
from sphinxkit.tokenizer import Tokenizer

DEVICES = ("cpu",)
QUICK = True
ANSWERS, QUICK_ANSWERS, MICRO_ANSWERS = 20_000, 2_000, 50
BOXES = 2  # of an answer
_NUMBER = re.compile(r"[0-9.]+")


def cases(context: Context) -> Iterator[Case]:
    count = context.pick(ANSWERS, MICRO_ANSWERS, QUICK_ANSWERS)
    yield from _conversations(count // 10)
    yield from _answers(count)


def _conversations(count: int) -> Iterator[Case]:
    """Conversations of four questions and answers, rendered, then tokenised with labels."""
    template = sphinx_v1()
    tokenizer = Tokenizer(GOLDEN / "llama_ens_light" / "tokenizer.model")
    messages = [
        {"role": role, "content": f"{words} {index} {turn}"}
        for index in range(count)
        for turn in range(4)
        for role, words in (("user", "What is at the left of number"), ("assistant", "A red ball lies there, beside"))
    ]
    conversations = [messages[start : start + 8] for start in range(0, len(messages), 8)]
    texts = [template.prompt(conversation) for conversation in conversations]

    def plain(turns: Sequence[dict[str, str]]) -> str:
        spoken = (f"{template.roles[turn['role']]} {turn['content']}{template.separator}" for turn in turns)
        return template.system + template.opening + "".join(spoken)

    size = sum(map(len, texts))
    yield Case(
        f"render {count} conversations of 8 messages",
        {
            "sphinxkit": lambda: [template.prompt(conversation) for conversation in conversations],
            "plain Python": lambda: [plain(conversation) for conversation in conversations],
        },
        Work(read_bytes=size, write_bytes=size),
        amount=count,
        unit="conversations",
        tolerance=0,
    )
    yield Case(
        f"token ids and labels of {count} conversations",
        {
            "sphinxkit": lambda: [template.encode(conversation, tokenizer) for conversation in conversations],
            "token ids alone": lambda: [tokenizer.encode(text, bos=True) for text in texts],
        },
        Work(read_bytes=size, write_bytes=size),
        amount=count,
        unit="conversations",
    )


def _answers(count: int) -> Iterator[Case]:
    """Detection answers of two boxes each, and one long one."""
    task, geometry, draw = tasks.create("detection"), ImageGeometry(640, 480), random.Random(0)

    def box() -> Box:
        x, y = draw.uniform(0, 500), draw.uniform(0, 400)
        return Box(x, y, x + draw.uniform(1, 140), y + draw.uniform(1, 80))

    samples = [DetectionSample("dog", tuple(box() for _ in range(BOXES)), geometry) for _ in range(count)]
    answers = [task.format(sample).answer for sample in samples]
    size = sum(map(len, answers))
    left, top = geometry.offset

    def write(sample: DetectionSample) -> str:
        places = (
            f"{(b.x1 + left) / geometry.side:.3f},{(b.y1 + top) / geometry.side:.3f},"
            f"{(b.x2 + left) / geometry.side:.3f},{(b.y2 + top) / geometry.side:.3f}"
            for b in sample.boxes
        )
        return "[" + ";".join(places) + "]"

    def read(text: str) -> list[float]:
        return [float(number) * geometry.side for number in _NUMBER.findall(text)]

    yield Case(
        f"format {count} detection answers of {BOXES} boxes",
        {
            "sphinxkit": lambda: [task.format(sample) for sample in samples],
            "plain Python": lambda: [write(sample) for sample in samples],
        },
        Work(read_bytes=8 * 4 * BOXES * count, write_bytes=size),
        amount=count,
        unit="answers",
    )
    broken = [answer.replace(",", " ").removesuffix("]") for answer in answers]
    for name, texts in (("perfect", answers), ("in need of repair", broken)):
        yield Case(
            f"parse {count} detection answers of {BOXES} boxes, {name}",
            {
                "sphinxkit": lambda texts=texts: [task.parse(text, geometry) for text in texts],
                "plain Python": lambda texts=texts: [read(text) for text in texts],
            },
            Work(read_bytes=size, write_bytes=8 * 4 * BOXES * count),
            amount=count,
            unit="answers",
        )
    text = (answers[0] + " ") * (50 * count // len(answers[0]))
    yield Case(
        f"parse one answer of {len(text) / 1e6:.3g} MB",
        {"sphinxkit": lambda: task.parse(text, geometry), "plain Python": lambda: read(text)},
        Work(read_bytes=len(text)),
        amount=len(text),
        unit="bytes",
    )
