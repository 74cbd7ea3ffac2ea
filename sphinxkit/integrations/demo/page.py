"""The page: a form on the left, the conversation and the drawing on the right."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sphinxkit.errors import SphinxkitError
from sphinxkit.formatters import tasks
from sphinxkit.integrations.demo.talk import Field, FieldError, Form, Reply, Talk, add_corner, form_fields
from sphinxkit.integrations.demo.talk import open_picture as read_picture
from sphinxkit.tilers import ImageSource, load_image

if TYPE_CHECKING:
    from sphinxkit.sphinx_model import SphinxModel

KEPT_SECONDS = 3600  # a conversation without a question, and a picture; our choice
CLOSED = (
    "Your earlier conversation was closed (an hour without a question, or many visitors). The model no longer knows "
    "it; this question began a new one."
)
FREE = "Chat in your own words"
TITLES = {
    "vqa": "Ask a question, get a short answer",
    "rec": "Find one thing",
    "detection": "Find everything of one kind",
    "caption": "Describe the picture in a sentence",
    "detailed_caption": "Describe the picture in detail",
    "grounded_caption": "Describe and mark what is named",
    "text_detection": "Read the words and mark them",
    "reg": "Describe a region",
    "pose": "Find a person's joints",
    "relation": "Find two things by their relation",
    "layout": "Find the parts of a page",
    "chart": "Read a chart as a table",
    "classification": "Name what the picture shows",
    "multiple_choice": "Choose among answers",
    "vizwiz": "Ask what may have no answer",
}
"""Tasks in plain words, in the menu's order; another task is shown by its name."""
WORDS = {
    "question": ("Question", "What color is the circle?"),
    "phrase": ("What to find", "the red circle"),
    "category": ("Kind of thing", "circle"),
}
"""Label and placeholder of the words, by the name of a task's text."""

SCROLL = """() => { setTimeout(() => {
    const shown = document.getElementById('conversation');
    if (shown.innerText.trim()) shown.scrollIntoView({block: 'nearest'});
}, 50); }"""
"""Shows the answer as it grows: on a phone it is below the form. (Once the page has drawn it: 50 ms are our choice.)"""

MARK = """(region) => { setTimeout(() => {
    document.querySelectorAll('#picture .sphinxkit-region').forEach((old) => old.remove());
    const image = document.querySelector('#picture img');
    const [x1, y1, x2 = x1, y2 = y1] = region.split(',').map(parseFloat);
    if (!image?.naturalWidth || !document.querySelector('#region') || !(x2 >= x1 && y2 >= y1)) return;
    const mark = document.createElement('div');
    mark.className = 'sphinxkit-region';
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
    const left = image.offsetLeft + (image.clientWidth - image.naturalWidth * scale) / 2;
    const top = image.offsetTop + (image.clientHeight - image.naturalHeight * scale) / 2;
    Object.assign(mark.style, {left: `${left + x1 * scale}px`, top: `${top + y1 * scale}px`,
        width: `${(x2 - x1) * scale}px`, height: `${(y2 - y1) * scale}px`});
    image.parentElement.append(mark);
}, 50); }"""
"""Marks the region in the picture, or its first corner. (Once the page has drawn the picture: 50 ms are our choice.)"""
START = """() => {
    const relabel = (files) => {
        const all = new DataTransfer();
        for (const file of files) all.items.add(new File([file], file.name, {type: 'image/png'}));
        return all.files;
    };
    const isOther = (files) => Array.from(files ?? []).some((file) => !file.type.startsWith('image/'));
    document.addEventListener('change', (event) => {
        const input = event.target;
        if (input.type === 'file' && isOther(input.files)) input.files = relabel(input.files);
    }, true);
    document.addEventListener('drop', (event) => {
        const input = event.target.closest?.('#picture') && document.querySelector('input[type=file]');
        if (!input || !isOther(event.dataTransfer.files)) return;
        event.preventDefault();
        event.stopPropagation();
        input.files = relabel(event.dataTransfer.files);
        input.dispatchEvent(new Event('change', {bubbles: true}));
    }, true);
}"""
"""Lets any file through to ``open_picture``, whose error stands below the field; gradio's own lies over the page."""

FIELDS: tuple[Field, ...] = get_args(Field)
CSS = """
:root, .dark { --block-info-text-color: var(--block-label-text-color); }
.sphinxkit-error { color: #b91c1c; border-left: 4px solid; padding: 4px 8px; }
.dark .sphinxkit-error { color: #fca5a5; }
button.primary { background: #c2410c; }
.sphinxkit-note { opacity: 0.8; font-size: var(--text-sm); overflow-wrap: anywhere; }
.sphinxkit-warning { border-left: 4px solid #d97706; padding: 4px 8px; margin: 6px 0; }
.sphinxkit-turn { margin: 0 0 14px; overflow-wrap: anywhere; }
.sphinxkit-turn pre { white-space: pre-wrap; font: inherit; margin: 0; padding: 6px 10px; border-radius: 8px; }
.sphinxkit-turn pre.asked { opacity: 0.8; padding-left: 0; }
.sphinxkit-turn pre.answer { background: var(--background-fill-secondary); border: 1px solid
  var(--border-color-primary); font-size: var(--text-lg); }
#examples .grid-wrap { min-height: 0; height: auto; max-height: none; overflow-x: auto; padding: 8px; }
#examples .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(120px, 1fr)); padding: 0; }
#examples .thumbnail-item { display: flex; flex-direction: column; width: 100%; height: 100%; aspect-ratio: auto; }
#examples .thumbnail-item img { aspect-ratio: 4 / 3; height: auto; object-fit: contain; }
#examples .thumbnail-item:hover { filter: none; }
#examples .caption-label { opacity: 1 !important; position: static; max-width: none; padding: 4px 6px; border: 0;
  background: none; white-space: normal; text-align: left; }
#picture .sphinxkit-region { position: absolute; min-width: 7px; min-height: 7px; pointer-events: none;
  border: 2px solid #fff; outline: 2px solid #000; box-shadow: inset 0 0 0 2px #000; }
footer { display: none !important; }
"""

AskedPicture = tuple[str, ImageSource, Mapping[str, Any]]
"""Task, picture and the fields of the task's question, as ``SphinxModel.ask`` takes them."""


def menu() -> list[tuple[str, str]]:
    """The tasks as the menu shows them: words and name; "" is no task. Tasks that take two texts are left out."""
    names = [name for name in tasks.names() if len(tasks.text_fields(tasks.create(name))) < 2]
    ordered = sorted(names, key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name))
    return [*((TITLES.get(name, name), name) for name in ordered), (FREE, "")]


def form_of(example: AskedPicture) -> tuple[str, str, str, str]:
    """Task, words, choices and region of an example, as they stand in the form."""
    task, _, fields = example
    takes = form_fields(task)
    box = fields.get("box")
    region = "" if box is None else f"{box.x1:g},{box.y1:g},{box.x2:g},{box.y2:g}"
    return task, fields.get(takes.words, ""), "\n".join(fields.get("choices", ())), region


def caption_of(example: AskedPicture) -> str:
    """An example's task in plain words, with what it asks about."""
    task, words, _, _ = form_of(example)
    if form_fields(task).words == "question":
        return words
    return f"{TITLES.get(task, task)}: {words}" if words else TITLES.get(task, task)


def show_turns(replies: Sequence[Reply], is_new: bool = False) -> str:
    """The conversation as HTML: questions and answers letter by letter, whatever marks they contain.

    Args:
        replies: In order.
        is_new: Whether an earlier conversation was closed; the visitor is told.
    """
    shown = [f'<div class="sphinxkit-warning" role="status">{html.escape(CLOSED)}</div>' * is_new]
    for reply in replies:
        warning = f'<div class="sphinxkit-warning">{html.escape(reply.warning)}</div>' if reply.warning else ""
        notes = html.escape("; ".join(reply.notes))
        shown.append(
            f'<div class="sphinxkit-turn"><pre class="asked">{html.escape(reply.asked)}</pre>'
            f'<pre class="answer">{html.escape(reply.text) or "…"}</pre>{warning}'
            f'<div class="sphinxkit-note">{notes}</div></div>'
        )
    return "".join(shown)


def make_page(
    gradio: Any,
    model: SphinxModel,
    *,
    title: str,
    about: str,
    examples: Sequence[AskedPicture],
    new_talk: Callable[[], Talk],
) -> Any:
    """The page as gradio's ``Blocks``.

    Args:
        gradio: The package.
        model: The model; one without vision gets a page without pictures.
        title: Stands on top.
        about: What the model knows, in plain text.
        examples: Pictures with questions, to click at.
        new_talk: Makes a visitor's conversation.
    """
    has_pictures = model.vision is not None
    choices = menu() if has_pictures else [(FREE, "")]
    first = choices[0][1]
    examples = examples if has_pictures else ()

    def errors(field: Field | None = None, message: str = "") -> list[Any]:
        """One update for every field's error: all are hidden but that of ``field``."""
        text = f'<div class="sphinxkit-error" role="alert">{html.escape(message)}</div>'
        return [gradio.update(visible=name == field, value=text if name == field else "") for name in FIELDS]

    def show_fields(task: str) -> list[Any]:
        takes = form_fields(task or None)
        label, placeholder = WORDS.get(takes.words, (takes.words.capitalize(), ""))
        return [
            gradio.update(visible=bool(takes.words), label=label, placeholder=placeholder),
            gradio.update(visible=takes.has_choices),
            gradio.update(visible=takes.has_region),
            gradio.update(visible=not task),
            *errors(),
        ]

    def respond(
        talk: Talk | None, log: str, source: str | None, task: str, words: str, options: str, region: str, keeps: bool
    ) -> Iterator[list[Any]]:
        is_closed = talk is None and bool(log)
        talk = talk or new_talk()
        question = Form(None if source is None else Path(source), task or None, words, options, region, keeps)
        try:
            for reply in talk.ask(question):
                earlier = talk.replies[:-1] if reply in talk.replies[-1:] else talk.replies
                drawing = gradio.update(value=reply.drawing, visible=reply.drawing is not None)
                yield [talk, show_turns([*earlier, reply], is_closed), drawing, *errors()]
        except FieldError as error:
            yield [talk, gradio.skip(), gradio.skip(), *errors(error.field, str(error))]
        except SphinxkitError as error:
            yield [talk, gradio.skip(), gradio.skip(), *errors("question", str(error))]

    def take_picture(source: str | None) -> list[Any]:
        """After an upload: the earlier conversation goes; what is no picture goes, too, and is told."""
        fresh = ["", gradio.update(value=None, visible=False), ""]
        try:
            if source is not None:
                read_picture(Path(source))
        except FieldError as error:
            return [None, *fresh, *errors("picture", str(error))]
        return [source, *fresh, *errors()]

    def click(region: str, event: Any) -> str:
        return add_corner(region, *event.index)

    def fill(event: Any) -> list[Any]:
        example = examples[event.index]
        task, words, options, region = form_of(example)
        return [load_image(example[1]), task, words, options, region, "", gradio.update(value=None, visible=False)]

    for handler in (click, fill):
        handler.__annotations__["event"] = gradio.SelectData  # gradio looks for it to pass the place

    said: dict[str, Any] = {}

    def place_for_error(field: Field) -> None:
        said[field] = gradio.HTML(visible=False)

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        talk = gradio.State(None, time_to_live=KEPT_SECONDS)
        hint = "<p>Click an example, or choose a picture of your own.</p>" if examples else ""
        gradio.HTML(f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{hint}")
        if examples:
            gallery = gradio.Gallery(
                [(load_image(example[1]), caption_of(example)) for example in examples],
                label="Examples",
                show_label=False,
                elem_id="examples",
                columns=len(examples),
                height="auto",
                format="png",
                allow_preview=False,
                interactive=False,
                buttons=[],
            )
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    label="Picture",
                    elem_id="picture",
                    height=320,
                    visible=has_pictures,
                )
                # gradio would open the file, whatever it is. (No subclass: gradio writes a file beside its source. No
                # update of a property: a visitor would get a new object.)
                picture.preprocess = lambda payload: None if payload is None else payload.path
                place_for_error("picture")
                task = gradio.Dropdown(choices, value=first, label="Task", visible=has_pictures, filterable=False)
                words = gradio.Textbox(label=WORDS["question"][0], placeholder=WORDS["question"][1])
                place_for_error("words")
                options = gradio.Textbox(label="Answers to choose from, one a line", lines=4, visible=False)
                place_for_error("choices")
                region = gradio.Textbox(
                    label="Region X1,Y1,X2,Y2",
                    info="Click two corners in the picture. Nothing is the whole picture.",
                    elem_id="region",
                    visible=False,
                )
                place_for_error("region")
                keeps = gradio.Checkbox(True, label="Remember earlier questions", visible=not first)
                button = gradio.Button("Ask", variant="primary")
                place_for_error("question")
            with gradio.Column():
                log = gradio.HTML("", elem_id="conversation", max_height=480, autoscroll=True)
                drawing = gradio.Image(
                    type="pil",
                    format="png",
                    label="What it found",
                    show_label=False,
                    buttons=[],
                    interactive=False,
                    visible=False,
                )
        said_errors = [said[name] for name in FIELDS]
        form = [picture, task, words, options, region]
        fields = [words, options, region, keeps, *said_errors]
        answer: dict[str, Any] = {
            "fn": respond,
            "inputs": [talk, log, *form, keeps],
            "outputs": [talk, log, drawing, *said_errors],
            "concurrency_id": "model",
            "show_progress": "minimal",
            "show_progress_on": button,
        }
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for event in (button.click, words.submit):
            event(**answer, api_visibility="private")
        log.change(None, js=SCROLL, **quiet)
        task.change(show_fields, task, fields, **quiet).then(None, region, js=MARK, **quiet)
        region.change(None, region, js=MARK, **quiet)
        for event in (picture.upload, picture.clear):
            event(take_picture, picture, [picture, log, drawing, region, *said_errors], **quiet)
        picture.select(click, region, region, **quiet)
        if examples:
            chosen = gallery.select(fill, None, [*form, log, drawing], **quiet)
            chosen.then(show_fields, task, fields, **quiet).then(**answer, api_visibility="private")
    return page
