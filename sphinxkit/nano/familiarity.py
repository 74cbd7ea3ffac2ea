"""Whether a picture is of the kind that SPHINX-nano knows: how far its mean image token lies from the drawn world's.

The distance is Mahalanobis's, in the tokens' main directions. Source: Lee et al., A Simple Unified Framework for
Detecting Out-of-Distribution Samples, arXiv:1807.03888, of one class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from sphinxkit.atomic import atomic_file
from sphinxkit.hub import nano_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from sphinxkit.nano.world.scene import Domain
    from sphinxkit.nano.world.splits import Split
    from sphinxkit.sphinx_model import SphinxModel
    from sphinxkit.tilers import ImageSource

__all__ = ["measure_familiarity", "unfamiliar"]

FILE = "familiar.npz"
"""Lies with the weights: the mean token, the main directions over their standard deviations, and the largest usual
distance."""

# Our choices.
NUM_DIRECTIONS = 64
JPEG_PERCENT = 40  # of the pictures measured are compressed, as drawings that people have are
QUALITIES = (35, 95)


def unfamiliar(model: SphinxModel, image: ImageSource) -> str | None:
    """A note where a picture is unlike the drawn world's, or None.

    Args:
        model: SPHINX-nano.
        image: An image in any form.
    """
    import numpy as np

    file = nano_folder() / FILE
    if not file.is_file():
        return None
    with np.load(file) as kept:
        mean, directions, limit = (kept[name] for name in ("mean", "directions", "limit"))
    distance = float(_distances(_mean_tokens(model, [image]), mean, directions)[0])
    if distance <= limit:
        return None
    return (
        f"unfamiliar picture (distance {distance:.2f}, drawn pictures are within {limit:.2f}): SPHINX-nano knows drawn "
        "shapes, words, stick figures, pages and charts; its answer is a guess"
    )


def measure_familiarity(
    model: SphinxModel, file: Path, num_scenes: int = 50, share_within: float = 0.98, seed: int = 5
) -> float:
    """Measure scenes of the training split and write ``familiar.npz``; the limit is taken from the validation split.

    Args:
        model: SPHINX-nano.
        file: Where to.
        num_scenes: Scenes of every task, of both domains and all sizes; for the limit a fifth as many.
        share_within: Share of the validation split's scenes within the limit.
        seed: Of the scenes.
    Returns:
        The limit.
    """
    import numpy as np

    tokens = _mean_tokens(model, _scenes("train", num_scenes, seed))
    mean = tokens.mean(0)
    variances, axes = np.linalg.eigh(np.cov(tokens.T))
    directions = axes[:, -NUM_DIRECTIONS:] / np.sqrt(variances[-NUM_DIRECTIONS:])
    others = _mean_tokens(model, _scenes("val", max(1, num_scenes // 5), seed))
    limit = np.quantile(_distances(others, mean, directions), share_within)
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, mean=mean, directions=directions.astype(np.float32), limit=limit)
    return float(limit)


def _mean_tokens(model: SphinxModel, images: Iterable[ImageSource]) -> NDArray[np.float32]:
    """The mean image token of each image, (N, D)."""
    import numpy as np
    import torch

    with torch.inference_mode():
        tokens = [model.encode_images(model.preprocess(image)).float().mean(1).cpu().numpy() for image in images]
    return np.concatenate(tokens)


def _distances(
    tokens: NDArray[np.float32], mean: NDArray[np.float32], directions: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Root mean square of the standard deviations from the mean, one a row."""
    import numpy as np

    distances: NDArray[np.float32] = np.sqrt((((tokens - mean) @ directions) ** 2).mean(-1))
    return distances


def _scenes(split: Split, num_scenes: int, seed: int) -> Iterator[Image]:
    """Pictures of both domains, all tasks and all sizes; some compressed."""
    from PIL import Image

    from sphinxkit.nano.world import KINDS_OF_TASK, World
    from sphinxkit.nano.world.rng import Rng

    domains: tuple[Domain, ...] = ("synthetic", "real")
    for domain in domains:
        world = World(domain, split, seed=seed, long_sides=(96, 1000))
        for task in KINDS_OF_TASK:
            for index in range(num_scenes):
                image = Image.fromarray(world.scene(index, task).image)
                rng = Rng("familiarity", world.name, task, index)
                if rng.chance(JPEG_PERCENT):
                    file = BytesIO()
                    image.save(file, "JPEG", quality=rng.between(*QUALITIES))
                    image = Image.open(file)
                yield image
