"""Questions as people ask them: other words for every task's instruction and for the world's questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sphinxkit.formatters import tasks
from sphinxkit.nano.world.phrases import plural
from sphinxkit.nano.world.rng import Rng

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "vqa": ("{question}", "{question}", "{question} Answer briefly."),
    "multiple_choice": (
        "{question}",
        "{question}\nAnswer with a letter.",
        "{question}\nWhich one is right?",
        "{question}\nAnswer with the letter of the right choice.",
    ),
    "caption": (
        "Describe the image.",
        "Describe this picture.",
        "What do you see?",
        "What is in the picture?",
        "What is in this image?",
        "What does the image show?",
        "Caption this.",
    ),
    "detailed_caption": (
        "Describe everything in the picture.",
        "Describe the picture in detail.",
        "Tell me everything you see.",
    ),
    "rec": (
        "Where is {phrase}?",
        "Where is {phrase}?",
        "Find {phrase}.",
        "Show me {phrase}.",
        "Locate {phrase}.",
        "Where do you see {phrase}?",
        "Can you find {phrase}?",
        "Draw a box around {phrase}.",
    ),
    "relation": ("Find both things: {phrase}.", "Show both of them: {phrase}."),
    "reg": (
        "What is in {box}?",
        "What is at {box}?",
        "What is this? {box}",
        "Name the thing in {box}.",
        "Describe {box}.",
        "What do you see in the region {box}?",
    ),
    "grounded_caption": (
        "What is where?",
        "Describe the picture and show where everything is.",
        "Describe the image with boxes.",
    ),
    "detection": (
        "Where are the {category}?",
        "Find all {category}.",
        "Show me all {category}.",
        "Detect the {category}.",
        "Find the {category} in the picture.",
        "Draw boxes around the {category}.",
    ),
    "text_detection": (
        "Read the text.",
        "Read all the words.",
        "What words are in the picture?",
        "Find the text.",
        "What does it say and where?",
    ),
    "layout": (
        "What is the layout of this page?",
        "Find the parts of this page.",
        "Where are the text, titles, lists, tables and figures?",
    ),
    "pose": (
        "Show the joints of the person in {box}.",
        "Where are the joints of the person at {box}?",
        "Find the key points of the person in {box}.",
        "What is the pose of the person in {box}?",
    ),
    "chart": (
        "Read this chart.",
        "What are the values in this chart?",
        "Turn the chart into a table.",
        "What does the chart show?",
    ),
    "classification": ("What is this?", "What kind of image is this?"),
}
"""Task to instructions that people type, with the fields of the task's own; our choice."""

_PARAPHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What color is (?P<x>.+)\?",
        ("What colour is {x}?", "Which color is {x}?", "What is the color of {x}?", "Which color does {x} have?"),
    ),
    (
        r"What shape is (?P<x>.+)\?",
        ("What is the {x} thing?", "Which shape is {x}?", "What shape does the {x} thing have?"),
    ),
    (r"What size is (?P<x>.+)\?", ("How big is {x}?", "How large is {x}?", "Which size is {x}?")),
    (
        r"How many (?P<x>.+) are there\?",
        (
            "How many {x} do you see?",
            "How many {x} are in the picture?",
            "Count the {x}.",
            "What is the number of {x}?",
            "How many {x} can you see?",
        ),
    ),
    (
        r"Is there (?P<x>.+)\?",
        ("Do you see {x}?", "Can you see {x}?", "Is there {x} in the picture?", "Does the picture show {x}?"),
    ),
    (r"Where is (?P<x>.+) relative to (?P<y>.+)\?", ("On which side of {y} is {x}?", "Seen from {y}, where is {x}?")),
    (
        r"What is written in the image\?",
        ("What does it say?", "What is written here?", "Which word is in the picture?", "What is the word?"),
    ),
    (r"What is written on (?P<x>.+)\?", ("What does {x} say?", "Which word is on {x}?")),
    (r"What is the value of (?P<x>.+)\?", ("How much is {x}?", "What value does {x} have?", "How high is {x}?")),
    (r"Which bar is the (?P<x>.+)\?", ("What is the {x} bar?", "Which bar is {x}?")),
    (r"What is the title of the page\?", ("What is the title?", "What is the page called?")),
    (r"Does the page have (?P<x>.+)\?", ("Is there {x} on the page?", "Do you see {x} on the page?")),
    (r"Does (?P<x>.+) face the viewer\?", ("Does {x} look at us?", "Is {x} facing us?")),
    (r"Does (?P<x>.+) raise the (?P<y>.+) arm\?", ("Is the {y} arm of {x} up?", "Is the {y} arm of {x} raised?")),
)


def paraphrase(question: str, rng: Rng) -> str:
    """A question of ``questions`` in other words, or as it is.

    Args:
        question: The question.
        rng: Random choices.
    """
    for pattern, others in _PARAPHRASES:
        found = re.fullmatch(pattern, question)
        if found:
            fields = found.groupdict()
            return rng.choice((question, *others)).format(**fields)
    return question


def everyday(task: str, sample: Any, rng: Rng) -> tuple[str, Any] | None:
    """An everyday instruction for a sample, and the sample in the words that fit it; None for tasks without one.

    Args:
        task: A name of ``KINDS_OF_TASK``.
        sample: A sample of the task.
        rng: Random choices.
    """
    if task not in WORDINGS:
        return None
    wording = rng.choice(WORDINGS[task])
    if isinstance(sample, tasks.QuestionSample | tasks.MultipleChoiceSample):
        return wording, replace(sample, question=paraphrase(sample.question, rng))
    if isinstance(sample, tasks.DetectionSample):
        # the answer names the category as the question does
        return wording.replace("{category}", plural(sample.category)), sample
    return wording, sample
