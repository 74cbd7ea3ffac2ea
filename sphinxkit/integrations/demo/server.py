"""Serves the page: limits, a private folder, and who may ask."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sphinxkit.errors import DataError
from sphinxkit.generation import Sampling
from sphinxkit.integrations.demo.page import CSS, START, AskedPicture, make_page
from sphinxkit.integrations.demo.talk import Talk
from sphinxkit.integrations.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

    from sphinxkit.sphinx_model import SphinxModel

# Our choices: visitors whose conversations are kept at once; the largest file.
MAX_VISITORS = 16
MAX_UPLOAD = "20mb"
LOOPBACK = ("127.0.0.1", "localhost")
FOLDER = "GRADIO_TEMP_DIR"  # gradio's name for the folder of uploads


def describe(model: SphinxModel) -> str:
    """What a model is, from its recipe: encoders, the size of pictures, the language model's size.

    Args:
        model: Any.
    """
    vision = model.vision
    billions = sum(parameter.numel() for parameter in model.llm.parameters()) / 1e9
    llm = f"a language model of {billions:.2g} billion parameters and a context of {model.llm.max_seq_len:,} tokens"
    if vision is None:
        return f"It is {llm}. It reads no pictures."
    names = ", ".join(encoder.name for branch in vision.branches for encoder in branch.encoders)
    views = f" in {vision.tiler.num_views} views" if vision.tiler.num_views > 1 else ""
    return (
        f"It is {llm}, with the encoders {names}. It reads pictures at {vision.image_size} x {vision.image_size} "
        f"pixels{views}. It answers best about the tasks that it was trained on."
    )


@contextmanager
def serving(
    model: SphinxModel,
    *,
    title: str = "SPHINX",
    about: str | None = None,
    examples: Sequence[AskedPicture] = (),
    sampling: Sampling | None = None,
    num_draft_tokens: int | None = None,
    picture_note: Callable[[Image], str | None] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> Iterator[str]:
    """Serve the page in threads of its own while the context is open; gives its address.

    Visitors' pictures lie in a folder that only this user can read, and go with the server.

    Args:
        model: The model.
        title: Stands on top.
        about: What the model knows; None: what its recipe tells (``describe``).
        examples: Pictures with questions, to click at (``sphinxkit.nano.examples``).
        sampling: How answers are written.
        num_draft_tokens: See ``SphinxModel.session``.
        picture_note: Gives a note where the model does not know a picture's kind, or None; for SPHINX-nano
            ``sphinxkit.nano.unfamiliar``.
        host: Address to listen at; 0.0.0.0 is open to the network.
        port: Port to listen at; 0 is a free one.
    Raises:
        MissingPackageError: gradio is not installed.
        DataError: It cannot listen there.
    """
    gradio = import_gradio()
    before = os.environ.get(FOLDER)
    with TemporaryDirectory(prefix="sphinxkit-demo-") as folder:
        os.environ[FOLDER] = folder  # gradio reads it when components are made
        try:
            page = make_page(
                gradio,
                model,
                title=title,
                about=describe(model) if about is None else about,
                examples=examples,
                new_talk=lambda: Talk(model, sampling or Sampling(), num_draft_tokens, picture_note),
            )
            try:
                _, url, _ = page.launch(
                    server_name=host,
                    server_port=port or free_port(),
                    share=False,
                    quiet=True,
                    prevent_thread_lock=True,
                    state_session_capacity=MAX_VISITORS,
                    max_file_size=MAX_UPLOAD,
                    app_kwargs={"middleware": trusted_hosts(host)},
                    ssr_mode=False,
                    css=CSS,
                    js=START,
                )
            except OSError as error:
                raise DataError(f"host {host}, port {port}: cannot listen there: {error}") from error
            try:
                yield str(url)
            finally:
                page.close(verbose=False)
        finally:
            os.environ.pop(FOLDER)
            if before is not None:
                os.environ[FOLDER] = before


def import_gradio() -> ModuleType:
    """The gradio package.

    Raises:
        MissingPackageError: It is not installed, or too old.
    """
    return require("gradio", "demo", oldest="6.0")


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as found:
        found.bind((LOOPBACK[0], 0))
        return int(found.getsockname()[1])


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
