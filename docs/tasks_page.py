"""The page of tasks and its pictures: ``python docs/tasks_page.py`` rewrites both; a test fails when they are old."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]  # so that the script runs in a checkout that is not installed

import task_pictures as pictures  # noqa: E402
from PIL import Image  # noqa: E402

from sphinxkit.formatters import draw, tasks  # noqa: E402
from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints  # noqa: E402
from sphinxkit.geometry import Box, ImageGeometry, Point  # noqa: E402

PAGE, FOLDER = DOCS / "tasks.md", DOCS / "_static" / "tasks"
COLOURS = 256  # of a PNG's palette: the pictures are flat
SCENE, PAPER = ImageGeometry(480, 320), ImageGeometry(360, 480)
CHILD, BALL, BALLS = "A child in a green shirt", "the red ball", "three balls"
CAPTION = f"{CHILD} plays with {BALLS} in front of a bakery."


@dataclass(frozen=True)
class Case:
    """One task's example.

    Args:
        task: Its registered name.
        picture: Name in ``task_pictures.PICTURES``.
        sample: What the task formats.
        asked: The box that the question is about.
        note: What the example does not show.
    """

    task: str
    picture: str
    sample: Any
    asked: Box | None = None
    note: str = ""


def _phrase(words: str, *boxes: Box) -> GroundedPhrase:
    return GroundedPhrase(words, boxes, CAPTION.index(words) if words in CAPTION else None)


CASES = (
    Case(
        "vqa",
        "scene",
        tasks.QuestionSample("What colour is the child's shirt?", "green"),
    ),
    Case("vizwiz", "scene", tasks.QuestionSample("What does the bread cost?", "Unanswerable")),
    Case(
        "multiple_choice",
        "scene",
        tasks.MultipleChoiceSample("Which ball is nearest to the child?", ("yellow", "red", "blue"), 1),
        note="`answer_start` puts words in front of the letter: ScienceQA is evaluated with `The answer is`.",
    ),
    Case("caption", "scene", tasks.CaptionSample(CAPTION)),
    Case(
        "detailed_caption",
        "scene",
        tasks.CaptionSample(
            "A child in a green shirt stands on a meadow between a bakery with a red roof and a tree. Three balls lie "
            "in the grass: a red one, a blue one and a yellow one. The sky is clear and the bakery is open."
        ),
    ),
    Case(
        "rec",
        "scene",
        tasks.RegionSample(BALL, pictures.RED_BALL, SCENE),
        note="The picture is 480 x 320: its square is 480 x 480 and begins 80 pixels above its top.",
    ),
    Case("reg", "scene", tasks.RegionSample("a tree with a round crown", pictures.TREE, SCENE), asked=pictures.TREE),
    Case(
        "relation",
        "scene",
        tasks.RelationSample(
            GroundedPhrase("the child", (pictures.CHILD,)),
            "stands next to",
            GroundedPhrase(BALL, (pictures.RED_BALL,)),
            SCENE,
        ),
        note="The space in front of the colon is the authors' own: it tells this instruction from that of `rec`.",
    ),
    Case(
        "grounded_caption",
        "scene",
        tasks.GroundedCaptionSample(
            CAPTION,
            (_phrase(CHILD, pictures.CHILD), _phrase(BALLS, *pictures.BALLS), _phrase("a bakery", pictures.HOUSE)),
            SCENE,
        ),
    ),
    Case("detection", "scene", tasks.DetectionSample("ball", pictures.BALLS, SCENE)),
    Case(
        "text_detection",
        "scene",
        tasks.TextDetectionSample((_phrase("BAKERY", pictures.BAKERY), _phrase("OPEN", pictures.OPEN)), SCENE),
    ),
    Case(
        "pose",
        "scene",
        tasks.PoseSample(Keypoints(pictures.JOINTS), pictures.CHILD, SCENE),
        asked=pictures.CHILD,
        note="COCO's 17 names; a point that cannot be seen (here the right ear) is left out.",
    ),
    Case(
        "layout",
        "page",
        tasks.LayoutSample(
            {
                "text": (*pictures.TEXTS, pictures.LAST_TEXT),
                "title": (pictures.TITLE,),
                "list": (pictures.LIST,),
                "table": (pictures.TABLE,),
                "figure": (pictures.FIGURE,),
            },
            PAPER,
        ),
        note='PubLayNet\'s five classes; `tasks.create("layout", classes="doclaynet")` has DocLayNet\'s eleven, and '
        "`classes=[...]` yours.",
    ),
    Case(
        "chart",
        "chart",
        tasks.ChartSample(
            "\n".join(["Year | Balls sold", *(f"{year} | {value}" for year, value in pictures.BARS.items())])
        ),
    ),
    Case("classification", "fruit", tasks.ClassificationSample("red apple")),
)


def drawn(case: Case) -> Image.Image:
    """The picture with what the answer says on it, and the box that was asked about."""
    image = pictures.PICTURES[case.picture]()
    geometry = ImageGeometry(image.width, image.height)
    task = tasks.create(case.task)
    if case.asked is not None:
        image = draw.draw_boxes(image, [case.asked], ["region"], ["#FFFFFF"])
    image = draw.draw_items(image, task.parse(task.format(case.sample).answer, geometry).items)
    return image.quantize(COLOURS, dither=Image.Dither.NONE)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _item(item: Any) -> str:
    """What a parser gives, shortly: numbers are pixels of the picture."""
    match item:
        case Box():
            return f"Box({', '.join(map(_number, (item.x1, item.y1, item.x2, item.y2)))})"
        case Point():
            return f"({_number(item.x)}, {_number(item.y)})"
        case GroundedPhrase():
            place = "" if item.start is None else f" at {item.start}"
            return f"{item.phrase!r}{place}: {', '.join(map(_item, item.boxes))}"
        case Keypoints():
            return "\n".join(f"{name}: {_item(point)}" for name, point in item.points.items())
        case _:
            return repr(item)


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def section(case: Case) -> str:
    """One task's part of the page."""
    task = tasks.create(case.task)
    image = pictures.PICTURES[case.picture]()
    example = task.format(case.sample)
    result = task.parse(example.answer, ImageGeometry(image.width, image.height))
    what = (inspect.getdoc(type(task)) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
    wordings = "\n".join(f"- `{wording}`".replace("\n", "⏎") for wording in task.wordings[1:])
    parts = [
        f"## {case.task}",
        f"{what} Metric: `{task.metric}`." + (f" {case.note}" if case.note else ""),
        f"Instruction:\n\n{_block(example.instruction)}",
        f"Answer:\n\n{_block(example.answer)}",
        f"![What this answer says, drawn onto the picture](_static/tasks/{case.task}.png)",
        "`parse` gives it back"
        + (", in pixels of the picture:" if case.picture != "chart" and _has_places(result) else ":"),
        _block("\n".join(map(_item, result.items))),
        f"Other wordings:\n\n{wordings}",
    ]
    return "\n\n".join(parts)


def _has_places(result: tasks.ParseResult[Any]) -> bool:
    return not any(isinstance(item, str) for item in result.items)


HEAD = """<!-- made by docs/tasks_page.py: change that, then run it -->
# Tasks

SPHINX learns many vision-language tasks together, each with its own instruction so that they do not collide. Every
task is an object with a name:

```python
from sphinxkit.formatters import tasks
from sphinxkit.geometry import Box, ImageGeometry

geometry = ImageGeometry(width=480, height=320)
task = tasks.create("rec")
example = task.format(tasks.RegionSample("the red ball", Box(193, 259, 231, 297), geometry))
assert example.answer == "[0.402,0.706,0.481,0.785]"
[box] = task.parse(example.answer, geometry).items
assert round(box.x1) == 193
assert task.prompt("the red ball") == example.instruction
```

Coordinates in text are fractions of the padded square's side, three decimals; everything else is in pixels of the
original picture. `parse` raises for no text: it repairs what models get wrong and tells every repair and every failure
in `errors`, by the kinds at the [end of this page](#what-a-parser-repairs). What the examples' answers say is drawn by
`sphinxkit.formatters.draw`. ⏎ stands for a line break.

| task | instruction | answer | metric |
|---|---|---|---|
"""

TAIL = """
## What a parser repairs

`ParseResult.errors` has one entry for each error, with its place in the answer. `is_repaired` says whether something
was made of it; strict scores count an answer that needed a repair as empty, lenient ones take what was read.

| kind | the answer's error |
|---|---|
{errors}

## Add a task

A task is one class: its words, how a sample becomes a question and an answer, and how an answer is read. Register it,
and `tasks.create`, `sphinxkit score` and `sphinxkit evaluate` know it by its name; the entry-point group of
[plug-ins](plugins.md) makes the command line import it. `metric` names one of
`sphinxkit.evaluation.metrics.registry`, which takes new ones too. `evaluate` fills the arguments of `prompt` from
an annotation's fields of the same names, and from its question where there is no such field.

```python
{count}
```
"""

COUNT = '''from dataclasses import dataclass

from sphinxkit.formatters import tasks
from sphinxkit.formatters.tasks.base import ErrorLog


@dataclass(frozen=True, slots=True)
class CountSample:
    """How many things of a kind a picture shows."""

    category: str
    count: int


@tasks.register("count")
class Count(tasks.Task[CountSample, str]):
    """Counting: the answer is a number in digits."""

    name = "count"
    metric = "accuracy"
    wordings = ("How many {category} does the image show? Answer with a number.", "Count the {category}.")

    def prompt(self, category, wording=0):
        return self.instruction(wording, category=category)

    def format(self, sample, wording=0):
        return tasks.Example(self.prompt(sample.category, wording), str(sample.count))

    def parse(self, text, geometry=None):
        log = ErrorLog(text)
        numbers = [word.strip(".,!") for word in text.split() if word.strip(".,!").isdigit()]
        if numbers[:1] != [text]:
            log.add("wording" if numbers else "empty", 0, len(text), is_repaired=bool(numbers))
        return tasks.ParseResult(tuple(numbers[:1]), tuple(log.errors), text)

    def items(self, sample):
        return (str(sample.count),)


task = tasks.create("count")
sample = CountSample("balls", 3)
assert task.format(sample) == tasks.Example("How many balls does the image show? Answer with a number.", "3")
assert task.parse("3").items == task.items(sample)
assert task.parse("There are 3 balls.").items == ("3",)
assert [error.kind for error in task.parse("many").failures] == ["empty"]'''


def _cell(text: str, most: int = 70) -> str:
    text = text.replace("\n", "⏎").replace("|", "\\|")
    return f"`{text if len(text) <= most else text[: most - 1] + '…'}`"


def _rows() -> Iterator[str]:
    for case in CASES:
        task = tasks.create(case.task)
        answer = task.format(case.sample).answer
        yield f"| [{case.task}](#{case.task}) | {_cell(task.wordings[0], 140)} | {_cell(answer)} | `{task.metric}` |"


def page() -> str:
    """The whole page."""
    errors = "\n".join(f"| `{kind}` | {text.replace('<', chr(92) + '<')} |" for kind, text in tasks.ERROR_KINDS.items())
    tail = TAIL.format(errors=errors, count=COUNT)
    return HEAD + "\n".join(_rows()) + "\n\n" + "\n\n".join(map(section, CASES)) + "\n" + tail


def main() -> None:
    """Rewrite the page and its pictures."""
    PAGE.write_text(page(), encoding="utf-8")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        drawn(case).save(FOLDER / f"{case.task}.png", optimize=True)


if __name__ == "__main__":
    main()
