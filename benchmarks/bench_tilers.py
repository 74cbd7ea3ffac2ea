"""Tilers: one photograph to the views of SPHINX-1k, pixels equal to the bit, against torchvision's pipeline."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import Case, Context, Work

QUICK = True
PADDING = (122, 116, 104)  # the CLIP mean times 255, truncated; as the public code pads


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: compresses and resizes like a photograph."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 12, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    noisy = smooth + torch.randn(smooth.shape, generator=generator) * 6
    return Image.fromarray(noisy.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _views(pixels: Tensor, tile: int) -> Tensor:
    """The public code's views: the whole through float16, then the four crops."""
    whole = torch.nn.functional.interpolate(pixels.half(), size=(tile, tile), mode="bicubic").to(pixels)
    crops = [pixels[..., y : y + tile, x : x + tile] for y in (0, tile) for x in (0, tile)]
    return torch.stack([whole, *crops], dim=1)


def cases(context: Context) -> Iterator[Case]:
    from sphinxkit.pixels import CLIP_MEAN, CLIP_STD
    from sphinxkit.tilers import GridTiler, Preprocessor, load_image

    tile = context.pick(224, 28)
    tiler = GridTiler(2, 2, tile)
    pixels = [(context.randn(1, 3, 2 * tile, 2 * tile),) for _ in range(4)]
    yield Case(
        f"tile {2 * tile} into five {tile}",
        {"sphinxkit": tiler.tile, "plain torch": lambda image: _views(image, tile)},
        Work(0, 3 * 4 * tile * tile * 4, 5 * 3 * tile * tile * 4),
        pixels,
        amount=1,
        unit="images",
        tolerance=0,
    )
    if context.device.type != "cpu":
        return
    shapes = context.pick(
        {"landscape": (1920, 1080), "portrait": (1080, 1920), "square": (1080, 1080), "small": (320, 240)},
        {"landscape": (64, 36), "portrait": (36, 64), "square": (40, 40)},
        {"landscape": (1920, 1080), "small": (320, 240)},
    )
    preprocessor = Preprocessor(2 * tile)
    try:
        from torchvision import transforms
    except ImportError:
        yield Case("preprocess", skip="torchvision is not installed")
        return
    theirs = transforms.Compose(
        [
            transforms.Resize(2 * tile, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )

    def pipeline(image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        side = max(image.size)
        if image.width != image.height:
            square = Image.new("RGB", (side, side), PADDING)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return _views(theirs(image).unsqueeze(0), tile)

    for shape, (width, height) in shapes.items():
        image = photograph(width, height)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        encoded = buffer.getvalue()
        work = Work(0, width * height * 3, 5 * 3 * tile * tile * 4)
        yield Case(
            f"{shape} {width}x{height}, decoded, to five {tile}",
            {"sphinxkit": lambda image: tiler.tile(preprocessor(image)), "PIL + torchvision": pipeline},
            work,
            [(image,), (photograph(width, height, seed=1),)],
            amount=1,
            unit="images",
            tolerance=0,
            repeats=15,
        )
        yield Case(
            f"{shape} {width}x{height}, JPEG, to five {tile}",
            {
                "sphinxkit": lambda data: tiler.tile(preprocessor(load_image(data))),
                "PIL + torchvision": lambda data: pipeline(Image.open(io.BytesIO(data))),
            },
            work,
            [(encoded,)],
            amount=1,
            unit="images",
            tolerance=0,
            repeats=15,
        )
