"""The limits, tried on a server that runs."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
httpx = pytest.importorskip("httpx", reason="needs gradio, which brings httpx: pip install 'sphinxkit[demo]'")

BIG = 21_000_000  # bytes; the limit is 20 MiB
LONG_ENOUGH = 60.0  # seconds


def upload(address: str, name: str, content: bytes) -> Any:
    return httpx.post(f"{address}/gradio_api/upload", files={"files": (name, content)}, timeout=LONG_ENOUGH)


def call(address: str, event: str, *values: Any, session: str) -> dict[str, Any]:
    """What an event's function gives; ``values`` are its inputs as the page sends them."""
    found = httpx.get(f"{address}/config").json()["dependencies"]
    index = next(each["id"] for each in found if each["backend_fn"] and each["targets"][0][1] == event)
    body = {"data": list(values), "fn_index": index, "session_hash": session}
    httpx.post(f"{address}/gradio_api/queue/join", json=body).raise_for_status()
    told: dict[str, Any] = {}
    with httpx.stream(
        "GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}, timeout=LONG_ENOUGH
    ) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_generating" and message["output"]["data"]:
                told = message
            if message.get("msg") == "process_completed":
                return message if event == "upload" or not message["success"] else told
    raise AssertionError("the server closed the answer")


def picture(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def png_of(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes((width // 8 + 1) * height), 9))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


def test_another_host_is_refused(address: str) -> None:
    assert httpx.get(address).status_code == 200
    assert httpx.get(address, headers={"host": "evil.example"}).status_code == 400


def test_uploads_are_limited_and_private(address: str) -> None:
    assert upload(address, "big.png", bytes(BIG)).status_code == 413
    [path] = upload(address, "small.png", png_of(8, 8)).json()
    [folder] = [each for each in Path(path).parents if each.name.startswith("sphinxkit-demo-")]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_no_other_files_are_read(address: str, red: Path) -> None:
    for name in ("/etc/passwd", str(red)):
        assert httpx.get(f"{address}/gradio_api/file={name}").status_code == 403
        refused = call(address, "upload", picture(name), session="other")
        assert not refused["success"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", png_of(30_000, 30_000), "image bomb.png: Image size (900000000 pixels) exceeds limit"),
        ("wide.png", png_of(30_000, 1_000), "image wide.png: 30000x1000 pixels are more than the limit of 25000000"),
        ("photo.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "image photo.jpg: not an image in a format that is opened"),
        ("cut.png", png_of(80, 80)[:45], "image cut.png: "),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image drawing.svg: not an image"),
    ],
)
def test_what_is_no_picture_is_told(address: str, name: str, content: bytes, message: str) -> None:
    [path] = upload(address, name, content).json()
    told = call(address, "upload", picture(path), session=name)["output"]["data"]
    assert told[0] is None
    assert message in told[4]["value"]


def test_who_was_evicted_is_told(address: str) -> None:
    form = (None, "", "What is it?", "", "", True)  # picture, no task, words

    def ask(session: str, log: str) -> str:
        told = call(address, "click", None, log, *form, session=session)["output"]["data"]
        return str(told[1])

    first = ask("first", "")
    assert "What is it?" in first
    assert "closed" not in ask("first", first)
    for session in ("second", "third"):
        assert "closed" not in ask(session, "")
    assert "Your earlier conversation was closed" in ask("first", first)
