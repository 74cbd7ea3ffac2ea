from __future__ import annotations

import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sphinxkit.errors import DataError
from sphinxkit.tilers import image_below, load_image, preprocess, to_rgb
from sphinxkit.tilers.images import MAX_PIXELS

ORIENTATION = 0x0112  # EXIF tag; TIFF 6.0


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x + 90], axis=-1)
    return Image.frombytes("RGB", (width, height), values.astype(np.uint8).tobytes())


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_give_their_pixels(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(gradient(), kind, **options)
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        image = load_image(source)
        assert image.mode == "RGB"
        assert image.tobytes() == gradient().tobytes()
    with path.open("rb") as file:
        assert load_image(file).tobytes() == gradient().tobytes()


def test_jpeg_equals_pillow(tmp_path: Path) -> None:
    data = encoded(gradient(), "jpeg")
    assert load_image(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "La", "RGBa", "RGBX", "LAB"]
)
def test_modes_convert_as_pillow_does(mode: str) -> None:
    source = gradient().convert("L").convert("LA") if mode in ("La", "PA") else gradient()
    source = source.convert("RGBA") if mode == "RGBa" else source
    image = source.convert("P").convert("PA") if mode == "PA" else source.convert(mode)
    # premultiplied alpha has no conversion of its own in Pillow
    expected = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    plain = image.convert(expected) if expected else image
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.tobytes() == plain.convert("RGB").tobytes()


def test_cmyk_jpeg() -> None:
    data = encoded(gradient().convert("CMYK"), "jpeg", quality=95)
    difference = np.asarray(load_image(data), dtype=int) - np.asarray(gradient(), dtype=int)
    assert np.abs(difference).mean() < 8  # JPEG's loss; a wrong ink polarity is off by more than 100


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_palette_with_transparency_keeps_its_colours(transparency) -> None:
    image = gradient().quantize(8)
    data = encoded(image, "png", transparency=transparency)
    assert load_image(data).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_not_blended(mode: str) -> None:
    image = gradient().convert(mode)
    image.putalpha(0)
    expected = gradient().convert(mode[:-1]).convert("RGB")
    assert load_image(encoded(image, "png")).tobytes() == expected.tobytes()


def deep(values: list[float], mode: str, kind: str) -> Image.Image:
    image = Image.frombytes(mode, (len(values), 1), struct.pack(f"={len(values)}{kind}", *values))
    return to_rgb(image)


def greys(image: Image.Image) -> list[int]:
    assert image.mode == "RGB"
    return list(image.tobytes()[::3])


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = [0, 128, 129, 257, 32896, 65535]
    expected = [0, 0, 1, 1, 128, 255]
    assert greys(deep(values, "I;16", "H")) == expected
    path = tmp_path / "deep.png"
    Image.frombytes("I;16", (6, 1), struct.pack("=6H", *values)).save(path)
    assert greys(load_image(path)) == expected
    big_endian = Image.frombytes("I;16B", (6, 1), struct.pack(">6H", *values))
    assert greys(to_rgb(big_endian)) == expected


def test_32_bit_modes() -> None:
    assert greys(deep([0, 257, 65535], "I", "i")) == [0, 1, 255]
    assert greys(deep([-100, 0, 100], "I", "i")) == [0, 128, 255]
    assert greys(deep([0, 70000, 140000], "I", "i")) == [0, 128, 255]
    assert greys(deep([0.0, 0.5, 1.0], "F", "f")) == [0, 128, 255]
    assert greys(deep([0.0, 100.0, 255.0], "F", "f")) == [0, 100, 255]
    assert greys(deep([0.0, 257.0, 65535.0], "F", "f")) == [0, 1, 255]
    assert greys(deep([-1.0, 0.0, 1.0], "F", "f")) == [0, 128, 255]
    assert greys(deep([-3.0, -3.0], "F", "f")) == [0, 0]
    with pytest.raises(DataError, match="mode F holds values that are not finite"):
        deep([0.0, float("nan")], "F", "f")


def test_a_16_bit_image_keeps_its_picture(tmp_path: Path) -> None:
    shallow = gradient().convert("L")
    values = np.asarray(shallow, dtype=np.uint16) * 257
    path = tmp_path / "deep.tif"
    Image.frombytes("I;16", shallow.size, values.tobytes()).save(path)
    assert load_image(path).tobytes() == shallow.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_exif_turns_the_image_upright_whoever_opens_it(orientation: int, kind: str) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the camera turned the picture by 270 degrees: store it turned by 90
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = gradient() if undo is None else gradient().transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(stored, kind, exif=exif)
    assert load_image(data).tobytes() == gradient().tobytes()
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(preprocess(opened, 32).numpy(), preprocess(gradient(), 32).numpy())


def test_a_deep_image_is_turned_upright_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = Image.frombytes("I;16", (4, 2), struct.pack("=8H", *(257 * value for value in range(8))))
    upright = load_image(encoded(stored, "png", exif=exif))
    assert upright.size == (2, 4)
    assert greys(upright) == [4, 0, 5, 1, 6, 2, 7, 3]


def test_exif_that_cannot_be_read_is_as_none() -> None:
    data = encoded(gradient(), "png", exif=b"Exif\0\0garbage")
    assert load_image(data).tobytes() == gradient().tobytes()


def test_a_file_object_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(gradient(), "png"))
    with (tmp_path / "a.png").open("rb") as file:
        pass
    with pytest.raises(DataError, match=r"image .*a\.png: cannot be read, read of closed file"):
        load_image(file)


def test_an_mpo_is_its_first_picture() -> None:
    data = encoded(gradient(), "mpo", save_all=True, append_images=[gradient().transpose(0)])
    first = Image.open(io.BytesIO(data))
    assert (first.format, first.n_frames) == ("MPO", 2)
    assert load_image(data).tobytes() == first.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_animations_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"moving.{kind}"
    path.write_bytes(encoded(gradient(), kind, save_all=True, append_images=[gradient().transpose(0)]))
    with pytest.raises(DataError, match=rf"moving\.{kind}: an animated or multi-page {kind.upper()} of 2 frames; save"):
        load_image(path)


def test_a_still_gif_is_taken() -> None:
    image = gradient().quantize(16)
    assert load_image(encoded(image, "gif")).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_named(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.frombytes("RGB", (64, 64), noise.tobytes()), kind)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=rf"cut\.{kind}: (the file is truncated or damaged|not an image|cannot be)"):
        load_image(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    data = bytearray(encoded(gradient(), "png"))
    at = data.index(b"IDAT") + 10
    data[at : at + 8] = b"\xff" * 8
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.png: the file is truncated or damaged \("):
        load_image(path)


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (3000, 2000)).save(path)
    with pytest.raises(DataError, match=r"bomb\.png: 3000x2000 pixels are more than the limit of 5999999; scale it"):
        load_image(path, max_pixels=5_999_999)
    assert load_image(path, max_pixels=6_000_000).size == (3000, 2000)


@pytest.mark.parametrize("factor", [1.01, 2.01])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_default_limit(factor: float, tmp_path: Path) -> None:
    side = int((MAX_PIXELS * factor) ** 0.5) + 1
    header = encoded(Image.new("1", (8, 8)), "bmp")
    path = tmp_path / "bomb.bmp"
    path.write_bytes(header[:18] + struct.pack("<ii", side, side) + header[26:])
    with pytest.raises(DataError, match=r"bomb\.bmp: .*(max_pixels|limit)"):
        load_image(path)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_bomb_warnings_as_errors_are_data_errors(tmp_path: Path) -> None:
    side = int((MAX_PIXELS * 1.5) ** 0.5)
    header = encoded(Image.new("1", (8, 8)), "bmp")
    with pytest.raises(DataError, match=r"<bytes>: Image size .* scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"):
        load_image(header[:18] + struct.pack("<ii", side, side) + header[26:])


def test_what_is_no_image(tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture at all")
    with pytest.raises(
        DataError, match=r"notes\.jpg: not an image in a format that is opened \(.*PNG.*\); it starts with b'not"
    ):
        load_image(text)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.png: the file is empty"):
        load_image(empty)
    with pytest.raises(DataError, match=r"gone\.png: there is no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="this is a directory, not an image file"):
        load_image(tmp_path)
    with pytest.raises(DataError, match="cannot be read, "):
        load_image(text / "below.png")
    with pytest.raises(DataError, match=r"cannot be read, .*null"):
        load_image("a\0b.png")
    with pytest.raises(DataError, match="the file object gives str; open it in binary mode"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected a PIL image, .* or a uint8 array .*, got int"):
        load_image(7)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image <bytes>: the file is empty"):
        load_image(b"")


def test_a_decoder_that_fails_on_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_, formats=None):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match="<bytes>: cannot be opened, error: unpack requires"):
        load_image(b"x")


def test_counting_frames_may_fail_and_memory_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import GifImagePlugin, PngImagePlugin

    def fail(_, formats=None):
        raise EOFError("no more frames")

    def exhausted(_):
        raise MemoryError

    monkeypatch.setattr(GifImagePlugin.GifImageFile, "n_frames", property(fail))
    with pytest.raises(DataError, match=r"truncated or damaged \(EOFError: no more frames\)"):
        load_image(encoded(gradient(), "gif"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", exhausted)
    with pytest.raises(MemoryError):
        load_image(encoded(gradient(), "png"))


@pytest.mark.parametrize("error", [ValueError("conversion not supported"), ImportError("no LittleCMS")])
def test_a_mode_without_rgb_is_named(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise error

    path = tmp_path / "lab.tif"
    Image.new("LAB", (4, 4)).save(path)
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DataError, match=r"lab\.tif: an image of mode LAB has no RGB form"):
        load_image(path)


@pytest.mark.parametrize("size", [(1, 1), (20000, 50), (50, 20000)])
def test_extreme_sizes_give_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "extreme.png"
    gradient(*size).save(path)
    assert preprocess(load_image(path), 224).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "sub/../a.jpg", "..a.jpg", "sub/a..b/c.jpg"])
def test_names_below_a_root(name: str) -> None:
    assert image_below(Path("root"), name) == Path("root") / os.path.normpath(name)


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "..", "sub/../../a.jpg", "/etc/passwd", "//etc/passwd", "./../b.png"]
)
def test_names_that_lead_out_of_a_root(name: str) -> None:
    with pytest.raises(DataError, match=rf"image '{re.escape(name)}' is not below the folder of images, photos;"):
        image_below(Path("photos"), name)


def test_links_inside_a_root_are_followed(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "a.png")
    assert load_image(image_below(tmp_path / "root", "link.png")).size == (3, 2)
    with pytest.raises(DataError, match=r"'link.png' is not below the folder of images"):
        image_below(tmp_path / "root", "link.png", follow_links=False)


def test_a_name_does_not_leave_a_root_through_a_link(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other" / "photos"
    for folder in (root / "own", other):
        folder.mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(folder.parent / "a.png")
    (other.parent / "secret.png").touch()
    (root / "link").symlink_to(other)
    (root / "inner").symlink_to(root / "own")
    assert not image_below(root, "link/../secret.png").exists()  # the system's ".." is that of the link's target
    for follow_links in (True, False):
        assert load_image(image_below(root, "inner/../a.png", follow_links=follow_links)).size == (3, 2)
    assert image_below(root, "a\0b.png", follow_links=False) == root / "a\0b.png"
