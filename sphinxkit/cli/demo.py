"""``sphinxkit demo``: web page for questions about images, with answers drawn on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.built_in import NANO
from sphinxkit.cli.options import AnswerOptions, Checkpoint, LoadOptions, option_groups
from sphinxkit.errors import DataError, SphinxkitError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.sphinx_model import ChatSession, SphinxModel

FREE = "(own words)"  # the choice of no task
# Our choices: visitors whose conversations are kept at once, and for how long; the largest picture (a camera's photo).
MAX_VISITORS = 16
KEPT_SECONDS = 3600
MAX_UPLOAD = "20mb"
MAX_PICTURE_PIXELS = 25_000_000
LOOPBACK = ("127.0.0.1", "localhost")
CLOSED = "the earlier conversation was closed (an hour without a question, or many visitors); this question begins anew"


@option_groups
def demo(
    *,
    checkpoint: Checkpoint = NANO,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 7860,
    answering: AnswerOptions,
    loading: LoadOptions,
) -> None:
    """Serve a web page for questions about images; boxes and key points of the answers are drawn.

    Without a CHECKPOINT, the built-in SPHINX-nano is used. Needs `pip install "sphinxkit[demo]"`. The server runs on
    this machine and sends no data elsewhere.

    Example:

    `sphinxkit demo --port 8000`
    """
    gradio = import_gradio()
    model = loading.load(checkpoint)
    with TemporaryDirectory(prefix="sphinxkit-demo-") as folder:  # of this user alone; it goes when the demo ends
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(gradio, model, answering)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                state_session_capacity=MAX_VISITORS,
                max_file_size=MAX_UPLOAD,
                app_kwargs={"middleware": trusted_hosts(host)},
            )
        except OSError as error:
            raise DataError(f"--host {host} --port {port}: cannot listen there: {error}") from error
        typer.echo(f"{url} (Ctrl-C ends)")
        page.block_thread()


def trusted_hosts(host: str) -> list[Any]:
    """What refuses requests that name another host than this machine: a web page elsewhere could send them.

    Args:
        host: Address that the demo listens at. The names under which another address is reached are not known, so
            only this machine's own addresses are checked.
    """
    if host not in LOOPBACK:
        return []
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return [Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)]


def import_gradio() -> Any:
    """The gradio package.

    Raises:
        DataError: It is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise DataError('the demo needs gradio: pip install "sphinxkit[demo]"') from error
    return gradio


@dataclass(frozen=True)
class Reply:
    """The page's reply to a question.

    Args:
        asked: The model's prompt.
        text: The answer.
        drawing: The image with the answer's boxes and points; None without an image.
        notes: What was drawn, what could not be parsed, and how sure the model is.
    """

    asked: str
    text: str
    drawing: Image | None
    notes: str


class Talk:
    """One visitor's conversation; a new image starts a new one.

    Args:
        model: The model.
        answering: Generation options.
    """

    def __init__(self, model: SphinxModel, answering: AnswerOptions) -> None:
        self._model = model
        self._answering = answering
        self._session: ChatSession | None = None
        self._source: Path | None = None
        self._picture: Image | None = None

    def ask(self, source: Path | None, task: str | None, words: str, box: str, keeps_history: bool) -> Reply:
        """Answer a question.

        Args:
            source: The image.
            task: Name of a task; None: the words are the question.
            words: See ``task_options.read_task``.
            box: See ``task_options.read_task``; "" is none.
            keeps_history: Whether to keep earlier turns about the image.
        Raises:
            DataError: The picture cannot be read, or the question is not complete.
        """
        from sphinxkit.cli.task_options import read_task
        from sphinxkit.formatters import tasks
        from sphinxkit.formatters.draw import count_places, draw_items, find_places, label_boxes
        from sphinxkit.geometry import ImageGeometry
        from sphinxkit.sphinx_model.answers import uncertainty
        from sphinxkit.tilers import load_image

        if self._session is None or source != self._source:
            picture = None if source is None else load_image(source, max_pixels=MAX_PICTURE_PIXELS)
            self._session = self._model.session(picture, num_draft_tokens=self._answering.num_draft_tokens)
            self._source, self._picture = source, picture
        if not keeps_history:
            self._session.reset()
        words = words.strip()
        geometry = None if self._picture is None else ImageGeometry(*self._picture.size)
        question: str | tasks.TaskQuestion = words
        if task is not None:
            if geometry is None:
                raise DataError(f"task {task!r} is about a picture: give one")
            question = read_task(task, words or None, box or None, geometry)
        asked = question if isinstance(question, str) else question.text
        if not asked:
            raise DataError("there is no question")
        how = self._answering
        text = self._session.ask(question, how.max_new_tokens, how.temperature, how.top_p, how.seed)
        confidence = self._session.confidence
        told = [] if confidence is None else [f"confidence {confidence:.2f}"]
        told += filter(None, [uncertainty(self._model.conversation, confidence)])
        if self._picture is None or geometry is None:
            return Reply(asked, text, None, "; ".join(told))
        found = find_places(text, geometry) if isinstance(question, str) else question.parse(text)
        items = label_boxes(found.items, "" if isinstance(question, str) else question.label)
        notes = [f"{count_places(items) or 'nothing'} drawn"]
        notes += [f"not read: {error.text!r} ({tasks.ERROR_KINDS[error.kind]})" for error in found.failures]
        drawing = draw_items(self._picture, [item for item in items if not isinstance(item, str)])
        return Reply(asked, text, drawing, "; ".join([*notes, *told]))


def add_corner(box: str, x: float, y: float) -> str:
    """The region after a click: the first sets a corner, the second the opposite one, the third begins anew.

    Args:
        box: ``X,Y`` or ``X1,Y1,X2,Y2``, in pixels, or nothing.
        x: x of the click, in pixels of the image.
        y: y of the click.
    """
    try:
        given = [float(word) for word in box.split(",")]
    except ValueError:
        given = []
    if len(given) != 2:
        return f"{x:g},{y:g}"
    return ",".join(f"{side:g}" for side in (*map(min, given, (x, y)), *map(max, given, (x, y))))


def make_page(gradio: Any, model: SphinxModel, answering: AnswerOptions) -> Any:
    """The page: picture, task, words and region on the left, conversation and drawing on the right.

    Args:
        gradio: The package.
        model: The model.
        answering: Generation options.
    """
    from sphinxkit.formatters import tasks

    def respond(
        talk: Talk | None, messages: list[Any], source: str | None, task: str, words: str, box: str, keeps_history: bool
    ) -> tuple[Any, ...]:
        was_closed = talk is None and bool(messages)
        talk = talk or Talk(model, answering)
        try:
            reply = talk.ask(
                None if source is None else Path(source), None if task == FREE else task, words, box, keeps_history
            )
        except SphinxkitError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        said = [{"role": "user", "content": reply.asked}, {"role": "assistant", "content": reply.text or "(no answer)"}]
        notes = "; ".join(filter(None, [CLOSED * was_closed, reply.notes]))
        return talk, [*messages, *said], reply.drawing, notes

    def click(box: str, event: Any) -> str:
        return add_corner(box, *event.index)

    click.__annotations__["event"] = gradio.SelectData  # gradio looks for it to pass the place
    with gradio.Blocks(title="SPHINX", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        talk = gradio.State(None, time_to_live=KEPT_SECONDS)
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    type="filepath",
                    image_mode=None,  # else gradio decodes it, whatever its size
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=320,
                )
                task = gradio.Dropdown([FREE, *tasks.names()], value=FREE, label="Task: words the question")
                words = gradio.Textbox(label="Question, phrase or category", autofocus=True)
                box = gradio.Textbox(label="Region X1,Y1,X2,Y2 (pose, reg): click two corners in the picture")
                keeps_history = gradio.Checkbox(False, label="Remember earlier questions")
                button = gradio.Button("Ask", variant="primary")
            with gradio.Column():
                chat = gradio.Chatbot(label="Conversation", height=320, render_markdown=False)
                drawing = gradio.Image(type="pil", format="png", label="What it found", interactive=False, height=320)
                notes = gradio.Textbox(label="Notes", interactive=False)
        asked = [talk, chat, picture, task, words, box, keeps_history]
        for event in (button.click, words.submit):
            event(respond, asked, [talk, chat, drawing, notes], api_visibility="private", concurrency_id="model")
        picture.change(lambda: ([], None, "", ""), None, [chat, drawing, notes, box], api_visibility="private")
        picture.select(click, box, box, api_visibility="private")
    return page
