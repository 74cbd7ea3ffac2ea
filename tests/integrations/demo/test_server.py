from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from sphinxkit.errors import DataError
from sphinxkit.integrations.demo import server
from sphinxkit.integrations.demo.server import describe, free_port, import_gradio, serving, trusted_hosts
from sphinxkit.integrations.optional import MissingPackageError
from sphinxkit.sphinx_model import SphinxModel

DOCS = Path(__file__).resolve().parents[3] / "docs" / "demo.md"


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    package = MagicMock(__version__="6.31.0")
    package.Blocks.return_value.__enter__.return_value.launch.return_value = (None, "http://127.0.0.1:8000/", None)
    monkeypatch.setitem(sys.modules, "gradio", package)
    monkeypatch.setattr(server, "trusted_hosts", lambda host: [host])  # starlette comes with gradio
    return package


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackageError, match=r'install it: pip install "sphinxkit\[demo\]"'):
        import_gradio()
    monkeypatch.setitem(sys.modules, "gradio", MagicMock(__version__="5.49.1"))
    with pytest.raises(MissingPackageError, match=r"gradio 5\.49\.1 is too old, 6\.0 or later"):
        import_gradio()


def test_limits_are_given_to_gradio(model: SphinxModel, gradio: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    page = gradio.Blocks.return_value.__enter__.return_value
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    with serving(model, port=8000) as url:
        assert url == "http://127.0.0.1:8000/"
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.parent == Path(tempfile.gettempdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        page.close.assert_not_called()
    page.close.assert_called_once()
    assert not folder.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == "before"
    told = page.launch.call_args.kwargs
    assert (told["server_name"], told["server_port"], told["share"]) == ("127.0.0.1", 8000, False)
    assert (told["max_file_size"], told["state_session_capacity"]) == ("20mb", 16)
    assert told["app_kwargs"] == {"middleware": ["127.0.0.1"]}
    page.launch.side_effect = OSError("in use")
    with (
        pytest.raises(DataError, match=r"host 127\.0\.0\.1, port 8000: cannot listen there: in use"),
        serving(model, port=8000),
    ):
        pass


@pytest.mark.usefixtures("gradio")
def test_the_page_of_docs(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "http://127.0.0.1:8000/\n"


def test_hosts_that_are_trusted() -> None:
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse("here"))], middleware=trusted_hosts("127.0.0.1")
    )
    client = TestClient(app)
    for host in ("127.0.0.1:7860", "localhost"):
        assert client.get("/", headers={"host": host}).text == "here"
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert trusted_hosts("192.0.2.1") == []


def test_what_a_model_is(model: SphinxModel) -> None:
    assert model.vision is not None
    told = describe(model)
    for branch in model.vision.branches:
        for encoder in branch.encoders:
            assert encoder.name in told
    size = model.vision.image_size
    assert f"It reads pictures at {size} x {size} pixels" in told
    assert f"a context of {model.llm.max_seq_len:,} tokens" in told


def test_a_free_port() -> None:
    assert 0 < free_port() < 65536
