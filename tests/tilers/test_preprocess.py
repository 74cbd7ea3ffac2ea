from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from sphinxkit.errors import DataError, ShapeError
from sphinxkit.pixels import CLIP_MEAN, CLIP_STD
from sphinxkit.tilers import Preprocessor, pad_and_resize, preprocess
from sphinxkit.tilers.preprocess import MAX_SIDE, PAD_COLOR

TYPES = ("llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.frombytes("RGB", (width, height), values.tobytes())


def plain(image: Image.Image, size: int) -> Image.Image:
    """The pipeline as Pillow does it in one go: pad, then resize the square."""
    rgb = image.convert("RGB")
    side = max(rgb.size)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def test_pad_color_is_the_truncated_clip_mean() -> None:
    assert tuple(int(255 * mean) for mean in CLIP_MEAN) == PAD_COLOR


@pytest.mark.parametrize("name", TYPES)
def test_hashes_of_the_public_implementation(golden: Path, name: str) -> None:
    facts = json.loads((golden / name / "golden.json").read_text())
    tensors = load_file(golden / name / "golden.safetensors")
    stride = facts["image_size"] // tensors["transform.wide.strided"].shape[1]
    for entry in facts["images"]:
        with Image.open(golden / entry["source"]) as image:
            square = pad_and_resize(image, facts["image_size"])
            pixels = preprocess(image, facts["image_size"])
        assert hashlib.sha256(square.tobytes()).hexdigest() == entry["sha256_resized_uint8"]
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == entry["sha256_float32"]
        stored = tensors[f"transform.{entry['name']}.strided"]
        assert torch.equal(pixels[0, :, stride // 2 :: stride, stride // 2 :: stride], stored)
        if entry["resized_png"]:
            with Image.open(golden / name / entry["resized_png"]) as expected:
                assert square.tobytes() == expected.tobytes()


@example((1, 1), 224)
@example((1, 700), 448)
@example((700, 1), 448)
@example((1920, 1080), 448)
@example((1080, 1920), 448)
@example((1080, 1920), 1024)
@example((1079, 1917), 672)
@example((224, 225), 224)
@example((449, 448), 448)
@example((2, 1), 512)
@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.sampled_from([224, 448, 672, 512, 1024, 336, 97, 8]),
)
def test_bitwise_equal_to_resizing_the_padded_square(sides: tuple[int, int], size: int) -> None:
    image = noise(*sides, seed=size)
    assert pad_and_resize(image, size).tobytes() == plain(image, size).tobytes()


@pytest.mark.parametrize(("sides", "size"), [((9001, 50), 448), ((50, 9001), 448), ((5003, 3), 672), ((3, 5003), 224)])
def test_bitwise_equal_at_extreme_aspect_ratios(sides: tuple[int, int], size: int) -> None:
    image = noise(*sides)
    expected = plain(image, size)
    assert pad_and_resize(image, size).tobytes() == expected.tobytes()


@pytest.mark.parametrize("sides", [(50000, 20), (20, 50000)])
def test_sides_whose_square_would_not_fit_in_memory(sides: tuple[int, int]) -> None:
    square = pad_and_resize(noise(*sides), 224)
    assert square.size == (224, 224)
    assert square.getpixel((5, 200) if sides[0] > sides[1] else (200, 5)) == PAD_COLOR
    assert square.getpixel((111, 111)) != PAD_COLOR


def test_floats_are_those_of_the_plain_float32_operations() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    ramp = Image.frombytes("RGB", (16, 16), values.repeat_interleave(3).numpy().tobytes())
    pixels = preprocess(ramp, 16)[0].flatten(1)
    for channel in range(3):
        mean, std = torch.tensor(CLIP_MEAN[channel]), torch.tensor(CLIP_STD[channel])
        assert torch.equal(pixels[channel], values.float().div(255).sub(mean).div(std))


def test_a_batch_is_its_rows() -> None:
    images = [noise(30, 20), noise(20, 30), noise(25, 25)]
    pixels = Preprocessor(32)(images)
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == torch.float32
    for row, image in zip(pixels, images, strict=True):
        assert torch.equal(row, preprocess(image, 32)[0])
    assert torch.equal(preprocess(tuple(images), 32), pixels)


def test_alpha_is_dropped_not_blended() -> None:
    opaque = noise(10, 10)
    clear = opaque.copy()
    clear.putalpha(0)
    assert torch.equal(preprocess(clear, 16), preprocess(opaque, 16))


def test_the_image_given_is_not_changed() -> None:
    image = noise(16, 16)
    before = image.tobytes()
    result = pad_and_resize(image, 16)
    result.paste((0, 0, 0), (0, 0, 16, 16))
    assert image.tobytes() == before


def test_images_in_every_form_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise(40, 30)
    path = tmp_path / "photo.png"
    image.save(path)
    expected = preprocess(image, 32)
    with Image.open(path) as opened, path.open("rb") as file:
        forms = [str(path), path, path.read_bytes(), file, np.asarray(image), opened]
        assert torch.equal(preprocess(forms, 32), expected.expand(len(forms), -1, -1, -1))
    for form in (str(path), path.read_bytes(), np.asarray(image)):
        assert torch.equal(preprocess(form, 32), expected)
    grey = np.asarray(image.convert("L"))
    assert torch.equal(preprocess(grey, 32), preprocess(image.convert("L"), 32))


def test_a_photo_opened_with_pil_is_turned_upright_as_its_path_is(tmp_path: Path) -> None:
    image, path = noise(40, 30), tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    image.save(path, exif=exif)
    with Image.open(path) as opened, Image.open(path) as again:
        upright = opened.transpose(Image.Transpose.ROTATE_270)
        assert torch.equal(preprocess(again, 32), preprocess(path, 32))
        assert torch.equal(preprocess(path, 32), preprocess(Image.fromarray(np.asarray(upright)), 32))


def test_the_host_programs_defaults_change_nothing() -> None:
    image = noise(40, 30)
    expected = preprocess(image, 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = preprocess(image, 32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), "expected a PIL image, .* got Tensor"),
        ([None], "expected a PIL image, .* got NoneType"),
        (
            np.zeros((4, 4, 3), dtype=np.float32),
            r"a uint8 array \(H, W, 3\) or \(H, W\), got float32 \(4, 4, 3\)",
        ),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"got uint8 \(3, 4, 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"got uint8 \(0, 4, 3\)"),
        ("photo.jpg", "image photo.jpg: there is no such file"),
        ("https://images.example/a.jpg", "image https://images.example/a.jpg: this is a URL; download"),
        ("/dev/zero", "image /dev/zero: not a regular file"),
    ],
)
def test_what_is_no_image(images, message: str) -> None:
    with pytest.raises(DataError, match=message):
        preprocess(images, 32)


def test_programs_are_no_pictures(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"photo\.jpg: not an image in a format that is opened"):
        preprocess(path, 32)


def test_an_image_that_was_opened_truncated_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut.jpg"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with (
        Image.open(path) as image,
        pytest.raises(DataError, match=r"cut\.jpg: the file is truncated or damaged \(OSError: "),
    ):
        preprocess(image, 32)

    def exhausted(_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", exhausted)
    with pytest.raises(MemoryError):
        preprocess(noise(4, 4), 32)


def test_the_bad_image_of_a_batch_is_named() -> None:
    with pytest.raises(DataError, match=r"the image is empty, 0x1 pixels \(image 1 of 2, counted from 0\)"):
        preprocess([noise(4, 4), Image.new("RGB", (0, 1))], 32)


def test_refusals() -> None:
    with pytest.raises(DataError, match="no images were given"):
        preprocess([], 32)
    with pytest.raises(DataError, match="the image is empty, 0x5 pixels"):
        preprocess(Image.new("RGB", (0, 5)), 32)
    with pytest.raises(DataError, match=f"is {MAX_SIDE + 1}x1 pixels, longer than {MAX_SIDE} on a side"):
        preprocess(Image.new("RGB", (MAX_SIDE + 1, 1)), 32)
    with pytest.raises(ShapeError, match="image_size must be 8 to 65535 whole pixels, got 7"):
        preprocess(noise(4, 4), 7)
    for wrong in (-1, "28", 28.0, None, 10**7):
        with pytest.raises(ShapeError, match=f"image_size must be 8 to 65535 whole pixels, got {wrong!r}"):
            preprocess(noise(4, 4), wrong)
