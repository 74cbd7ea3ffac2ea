"""SPHINX-nano's own SentencePiece tokenizer, trained on text of the procedural world."""

from __future__ import annotations

import io
from collections.abc import Iterator
from string import ascii_lowercase

from sphinxkit.formatters import create as create_template
from sphinxkit.formatters.tasks import COCO_KEYPOINTS, create
from sphinxkit.nano.world import World
from sphinxkit.nano.world.world import TASKS, TEXT_TASK

CONVERSATION = "sphinx_v1"
GRID = 128
"""Coordinates that are one piece: multiples of 1/128 of the side, with three decimals, alone and after a comma; other
numbers are spelled in digits. Our choice: a box is six pieces instead of 29."""

VOCAB_SIZE = 960
NUM_RECORDS = 400  # of every task that the pieces are counted in
_SPACE = "\u2581"  # how SentencePiece writes a space


def coordinate_pieces() -> list[str]:
    """Every coordinate that is one piece, alone and after a comma."""
    values = [f"{step / GRID:.3f}" for step in range(GRID + 1)]
    return [*values, *(f",{value}" for value in values)]


def fixed_pieces() -> list[str]:
    """Pieces that are never split or merged.

    What frames a conversation, the tasks' wordings, coordinates, tags, and capitals and digits one by one, so that a
    word that is new is spelled as any other.
    """
    template = create_template(CONVERSATION)
    frame = [template.system + template.opening, *(f" {role}:" for role in ("Human", "Assistant")), template.separator]
    named = [name for name in TASKS if name != TEXT_TASK]
    wordings = [part for name in named for part in _fixed_parts(create(name).wordings[0])]
    wordings += [" in the region", "Question:\n", "\nChoices:\n"]
    joints = [f" <p>{name}</p>[" for name in COCO_KEYPOINTS]
    tags = ["<p>", " <p>", "</p>[", "[", " [", "]", ";", "\n"]
    signs = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).islower()]
    pieces = [*frame, *wordings, *joints, *coordinate_pieces(), *tags, *signs]
    return list(dict.fromkeys(piece.replace(" ", _SPACE) for piece in pieces))


def _fixed_parts(wording: str) -> list[str]:
    """What stands between a wording's places to fill in: "Detect all " and " shown in the image."."""
    parts, rest = [], wording
    while "{" in rest:
        before, _, rest = rest.partition("{")
        parts.append(before)
        rest = rest.partition("}")[2]
    # a space belongs to the word after it
    return [part for part in (text.rstrip(" ") for text in [*parts, rest]) if len(part) > 1]


def _lines(size: int) -> Iterator[str]:
    for domain in ("synthetic", "real"):
        world = World(domain=domain, size=size)
        for task in TASKS:
            for index in range(NUM_RECORDS):
                if task == TEXT_TASK:
                    yield world.text(index)
                    continue
                for message in world.conversation(index, task, 4)[1]:
                    yield message["content"]


def train_tokenizer(size: int = 64) -> bytes:
    """Train the tokenizer; the same bytes every time.

    Args:
        size: Side of the world's pictures, in pixels; it makes little difference.
    Returns:
        A SentencePiece model, as ``Tokenizer`` takes it.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_lines(size),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        required_chars=ascii_lowercase,
        user_defined_symbols=fixed_pieces(),
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
