"""Pictures as users have them, from the command line, against a released-layout checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import DataError


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut())


def ask(golden: Path, image: Path) -> dict:
    arguments = [str(golden / "llama_ens"), "-i", str(image), "-p", "What is this?", "--max-new-tokens", "3"]
    options = ["--dtype", "float32", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, ["generate", *arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rotated(photo: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photo.crop((0, 0, 300, 200)).save(path, exif=exif, quality=95)


def sixteen_bit(photo: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(path)


SAVERS = {
    "photo.jpg": lambda photo, path: photo.save(path, quality=90),
    "alpha.png": lambda photo, path: photo.convert("RGBA").save(path),
    "palette.png": lambda photo, path: photo.convert("P").save(path),
    "grey.png": lambda photo, path: photo.convert("L").save(path),
    "deep.png": sixteen_bit,
    "cmyk.jpg": lambda photo, path: photo.convert("CMYK").save(path),
    "rotated.jpg": rotated,
    "dot.png": lambda photo, path: photo.resize((1, 1)).save(path),
    "banner.png": lambda photo, path: photo.resize((20000, 50)).save(path),
    "photo.webp": lambda photo, path: photo.save(path),
    "photo.tiff": lambda photo, path: photo.save(path),
    "photo.bmp": lambda photo, path: photo.save(path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_any_kind_of_picture_gets_an_answer(golden: Path, photo: Image.Image, tmp_path: Path, name: str) -> None:
    SAVERS[name](photo, tmp_path / name)
    answer = ask(golden, tmp_path / name)
    assert len(answer["token_ids"]) == 3


def test_the_picture_matters(golden: Path, photo: Image.Image) -> None:
    model = sphinxkit.load(golden / "llama_ens")
    seen = model.encode_images(model.preprocess([photo, photo.rotate(180)]))
    assert not seen[0].allclose(seen[1], atol=1e-2)


def test_a_turned_picture_is_turned_upright_in_every_form(golden: Path, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "rotated.jpg"
    rotated(photo, path)
    model = sphinxkit.load(golden / "llama_ens")
    opened = Image.open(path)
    upright = model.preprocess(Image.fromarray(np.asarray(opened.convert("RGB"))).rotate(-90, expand=True))
    assert not model.preprocess(np.asarray(opened.convert("RGB"))).equal(upright)
    for form in (path, opened, path.read_bytes()):
        assert model.preprocess(form).equal(upright)


def text(photo: Image.Image, path: Path) -> None:
    path.write_text("this is not a picture")


def truncated(photo: Image.Image, path: Path) -> None:
    photo.save(path, quality=90)
    path.write_bytes(path.read_bytes()[:5000])


def bomb(photo: Image.Image, path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path)


def animated(photo: Image.Image, path: Path) -> None:
    small = photo.resize((8, 8))
    small.save(path, save_all=True, append_images=[small.rotate(90)])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("notes.jpg", text),
        ("half.jpg", truncated),
        ("bomb.png", bomb),
        ("moving.gif", animated),
        ("empty.png", lambda photo, path: path.touch()),
        ("missing.png", lambda photo, path: None),
        ("folder", lambda photo, path: path.mkdir()),
    ],
)
def test_what_is_no_picture_is_a_named_error(
    golden: Path, photo: Image.Image, tmp_path: Path, name: str, write
) -> None:
    write(photo, tmp_path / name)
    with pytest.raises(DataError, match=name):
        ask(golden, tmp_path / name)
