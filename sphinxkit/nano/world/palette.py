"""The colours of the world, and the tints behind it."""

from __future__ import annotations

from collections.abc import Mapping

from sphinxkit.nano.world.rng import Rng

RGB = tuple[int, int, int]

# Far from each other and from every background; our choice.
COLORS: Mapping[str, RGB] = {
    "red": (214, 38, 38),
    "orange": (244, 138, 22),
    "yellow": (252, 222, 40),
    "green": (38, 160, 66),
    "cyan": (46, 204, 214),
    "blue": (44, 82, 214),
    "purple": (146, 58, 184),
    "black": (28, 28, 30),
}
DARK: RGB = (28, 28, 30)
LIGHT: RGB = (246, 246, 242)
SKIN: RGB = (232, 190, 152)
HAIR: RGB = (84, 56, 40)

REAL_JITTER = 18  # largest change of a channel of a colour in the real domain; our choice


def synthetic_tint(rng: Rng) -> RGB:
    """A pale, nearly grey background."""
    level = rng.between(206, 240)
    return (level + rng.between(-6, 8), level + rng.between(-6, 8), level + rng.between(-6, 8))


def real_tint(rng: Rng) -> RGB:
    """A background of middle brightness."""
    level = rng.between(128, 190)
    return (level + rng.between(-20, 20), level + rng.between(-20, 20), level + rng.between(-20, 20))


def paper_tint(rng: Rng) -> RGB:
    """A sheet of paper: white, or nearly."""
    return (rng.between(240, 255), rng.between(240, 255), rng.between(236, 255))


def jittered(color: RGB, rng: Rng, most: int) -> RGB:
    """A colour with every channel changed by at most ``most``, within [0, 255]."""
    if most == 0:
        return color
    red, green, blue = (min(max(channel + rng.between(-most, most), 0), 255) for channel in color)
    return red, green, blue


def luminance(color: RGB) -> int:
    """Brightness in [0, 255], by the integer weights 77, 150 and 29 of 256 (ITU-R BT.601, rounded)."""
    return (77 * color[0] + 150 * color[1] + 29 * color[2]) >> 8
