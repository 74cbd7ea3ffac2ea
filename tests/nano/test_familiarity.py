from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sphinxkit import nano
from sphinxkit.nano.examples import examples
from sphinxkit.nano.familiarity import measure_familiarity
from sphinxkit.nano.world import KINDS_OF_TASK, World, render

CLOSE = 1e-4  # of a distance in float32


class Coarse:
    """Image tokens are the pictures in 2 x 2 x 3 numbers, twice; the second token is larger by 2."""

    def preprocess(self, image: Any) -> Tensor:
        small = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return torch.from_numpy(np.asarray(small.convert("RGB").resize((2, 2)), dtype=np.float32))[None]

    def encode_images(self, pixels: Tensor) -> Tensor:
        token = pixels.flatten(1) / 255
        return torch.stack([token, token + 2], 1)


def tokens_of(pictures: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
    model = Coarse()
    return np.stack([model.encode_images(model.preprocess(picture)).mean(1)[0].double() for picture in pictures])


def test_the_distance_is_mahalanobis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.nano.familiarity.JPEG_PERCENT", 0)
    monkeypatch.setattr("sphinxkit.nano.familiarity.nano_folder", lambda: tmp_path)
    model: Any = Coarse()
    grey = np.full((4, 4, 3), 255 - 130, dtype=np.uint8)
    assert nano.unfamiliar(model, grey) is None  # nothing is measured
    limit = measure_familiarity(model, tmp_path / "familiar.npz", num_scenes=3, share_within=1.0, seed=1)

    def drawn(split: Any, count: int) -> NDArray[np.float64]:
        worlds = [World(domain, split, seed=1, long_sides=(96, 1000)) for domain in ("synthetic", "real")]
        return tokens_of([w.scene(i, t).image for w in worlds for t in KINDS_OF_TASK for i in range(count)])

    known, held_out = drawn("train", 3), drawn("val", 1)
    inverse, mean = np.linalg.inv(np.cov(known.T)), known.mean(0)

    def distances(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        away = tokens - mean
        found: NDArray[np.float64] = np.sqrt(np.einsum("nd,de,ne->n", away, inverse, away) / away.shape[1])
        return found

    assert limit == pytest.approx(distances(held_out).max(), rel=CLOSE)
    for level in range(0, 256, 15):
        picture = np.full((4, 4, 3), level, dtype=np.uint8)
        picture[:2, :2, 0] = 255 - level
        distance = distances(tokens_of([picture]))[0]
        note = nano.unfamiliar(model, picture)
        assert (note is not None) == (distance > limit)
        assert note is None or note.startswith(
            f"unfamiliar picture (distance {distance:.2f}, drawn pictures are within"
        )


@pytest.mark.skipif(
    not (nano.path() / "familiar.npz").is_file(), reason="this checkout is without SPHINX-nano's weights"
)
def test_it_knows_its_world_and_no_photograph() -> None:
    model = nano.load()
    assert [example.task for example in examples() if nano.unfamiliar(model, example.picture)] == []
    drawn = [render(World("real", "test", size=200).scene_of_kind(index, "mixed")) for index in range(4)]
    assert [nano.unfamiliar(model, picture) for picture in drawn] == [None] * 4
    height, width = np.mgrid[:300, :400]
    smooth = np.stack([height * 0.8, width * 0.6, 255 - width * 0.6], -1).astype(np.uint8)
    textured = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for picture in (smooth, textured):
        note = nano.unfamiliar(model, Image.fromarray(picture))
        assert note is not None
        assert note.endswith("its answer is a guess")
