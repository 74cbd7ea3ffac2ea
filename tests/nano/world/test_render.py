from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sphinxkit.nano.world
from sphinxkit.nano.world import COLORS, KINDS, Scene, World, render
from sphinxkit.nano.world.font import text_mask
from sphinxkit.nano.world.palette import REAL_JITTER
from sphinxkit.nano.world.render import NOISE_BITS

PROGRAM = """
import hashlib
from sphinxkit.nano.world import KINDS, World, render
for domain in ("real", "synthetic"):
    for kind in KINDS:
        scene = World(domain, "train", (120, 112), seed=7).scene_of_kind(11, kind)
        print(hashlib.sha256(render(scene).tobytes()).hexdigest(), scene.content_hash)
"""

PIXEL_MODULES = (
    *("rng", "font", "shapes", "figures", "pages", "charts"),
    *("page_blocks", "palette", "composition", "words", "splits", "render"),
)


def pixels_digest(world: World, kinds: Any = KINDS) -> str:
    digest = hashlib.sha256()
    for kind in kinds:
        for index in range(3):
            digest.update(render(world.scene_of_kind(index, kind)).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        (World("synthetic", "train", 112, seed=0), "4be8ff6ca39a3b13accca90635c3ad3745cb4df129e7b783c0e1bb09a95ccfcb"),
        (World("real", "train", 112, seed=0), "ce0c50533d926454bac79399d22f84193d7d915fbe178525b57ceab3fcda77fd"),
        (World("real", "test", 224, seed=0), "cd34cf60f3727602eaeb4e8dd8105961b323b19f596d54e3ed01f9f10cf8497b"),
        (
            World("synthetic", "val", (96, 160), seed=5),
            "939b6b5e5011db8eaf952de1f9b19bdc1b2e373d5841ecbacac1a08a67e304cc",
        ),
    ],
    ids=repr,
)
def test_pixels_are_the_same_everywhere(world: World, expected: str) -> None:
    assert pixels_digest(world) == expected


@pytest.mark.parametrize("module", PIXEL_MODULES)
def test_pixels_are_made_of_integers(module: str) -> None:
    """No division but the integer one, no floating-point constant, nobody else's random numbers or drawing."""
    path = Path(sphinxkit.nano.world.__file__).parent / f"{module}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Div), module
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), module
        assert not (isinstance(node, ast.Attribute) and node.attr in ("random", "sqrt", "sin", "cos", "float32")), (
            module
        )
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & {"PIL", "random", "math", "torch"}, module


@pytest.mark.slow
def test_other_processes_draw_the_same() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    lines = [
        f"{hashlib.sha256(render(scene).tobytes()).hexdigest()} {scene.content_hash}"
        for domain in ("real", "synthetic")
        for kind in KINDS
        for scene in [World(domain, "train", (120, 112), seed=7).scene_of_kind(11, kind)]
    ]
    assert outputs == {"\n".join(lines) + "\n"}


def test_pictures_have_their_size_and_cannot_be_changed() -> None:
    image = render(World(size=(80, 100)).scene_of_kind(0, "shapes"))
    assert image.shape == (100, 80, 3)
    assert image.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_synthetic_scenes_are_clean() -> None:
    for index in range(20):
        scene = World().scene_of_kind(index, "shapes")
        found = {tuple(color) for color in render(scene).reshape(-1, 3).tolist()}
        assert found == {scene.tint, *(COLORS[shape.color] for shape in scene.shapes)}


def test_real_scenes_are_textured_and_noisy() -> None:
    for index in range(20):
        scene = World("real").scene_of_kind(index, "shapes")
        shape = max(scene.shapes, key=lambda shape: shape.side)
        middle = render(scene)[shape.rect.y1 : shape.rect.y2, shape.rect.x1 : shape.rect.x2].reshape(-1, 3).astype(int)
        true = np.array(shape.rgb)
        inside = middle[(abs(middle - true) <= 1 << (NOISE_BITS - 1)).all(axis=1)]
        assert len(np.unique(inside, axis=0)) > 20
        assert all(abs(a - b) <= REAL_JITTER for a, b in zip(shape.rgb, COLORS[shape.color], strict=True))
        corner = render(scene)[:8, :8].reshape(-1, 3)
        assert len(np.unique(corner, axis=0)) > 20


def read_word(scene: Scene, rect: Any, rgb: Any, scale: int) -> list[str]:
    """Every string of the candidates whose ink is exactly the pixels of that colour in a rectangle."""
    ink: NDArray[np.bool_] = (render(scene)[rect.y1 : rect.y2, rect.x1 : rect.x2] == rgb).all(axis=2)
    readings = [""]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    width = ink.shape[1]
    for _ in range(5):
        longer = []
        for start in readings:
            for letter in alphabet:
                mask = text_mask(start + letter, scale)
                if mask.shape[1] <= width and mask.shape[0] == ink.shape[0]:
                    end = max(0, mask.shape[1] - scale)
                    if np.array_equal(mask[:, :end], ink[:, :end]):
                        longer.append(start + letter)
        exact = [text for text in longer if np.array_equal(text_mask(text, scale), ink)]
        if exact:
            return exact
        readings = longer
    return []


def test_words_can_be_read_back() -> None:
    count = 0
    for index in range(25):
        scene = World().scene_of_kind(index, "texts")
        for word in scene.words:
            assert read_word(scene, word.rect, word.rgb, word.scale) == [word.text]
            count += 1
    assert count > 25


def test_chart_labels_values_and_lengths() -> None:
    for index in range(25):
        scene = World().scene_of_kind(index, "chart")
        chart = scene.chart
        assert chart is not None
        assert len({bar.value for bar in chart.bars}) == len({bar.label for bar in chart.bars}) == len(chart.bars)
        lengths = [bar.rect.width if chart.is_horizontal else bar.rect.height for bar in chart.bars]
        by_value = sorted(zip([bar.value for bar in chart.bars], lengths, strict=True))
        assert [length for _, length in by_value] == sorted(lengths)
        for bar in chart.bars:
            for text, (left, top) in ((bar.label, bar.label_at), (str(bar.value), bar.value_at)):
                mask = text_mask(text, chart.scale)
                region = render(scene)[top : top + mask.shape[0], left : left + mask.shape[1]]
                assert np.array_equal((region == (28, 28, 30)).all(axis=2), mask), (index, text)


def test_key_points_lie_on_drawn_pixels() -> None:
    for index in range(25):
        scene = World().scene_of_kind(index, "people")
        for person in scene.people:
            for name, (x, y) in person.pixels.items():
                point = person.keypoints.points[name]
                assert (point.x, point.y) == (x + 0.5, y + 0.5)
                assert tuple(render(scene)[y, x]) != scene.tint
