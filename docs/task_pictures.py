"""The pictures that the page of tasks is about, drawn by code: a scene, a page, a chart, an apple.

What is where is data here, in pixels of the finished picture, so that the examples' boxes are true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from sphinxkit.geometry import Box, Point

SCALE = 3  # drawn so much larger, then made smaller: smooth edges

HOUSE, TREE = Box(28, 40, 184, 232), Box(350, 66, 456, 236)
RED_BALL, BLUE_BALL, YELLOW_BALL = Box(193, 259, 231, 297), Box(331, 259, 363, 291), Box(417, 269, 453, 305)
BALLS = (RED_BALL, BLUE_BALL, YELLOW_BALL)
BAKERY, OPEN = Box(62, 98, 150, 120), Box(90, 178, 122, 195)
CHILD = Box(234, 122, 314, 296)
JOINTS = {  # the child looks to its left: its right ear cannot be seen
    "nose": Point(280, 143),
    "left_eye": Point(284, 138),
    "right_eye": Point(275, 138),
    "left_ear": Point(290, 141),
    "left_shoulder": Point(294, 170),
    "right_shoulder": Point(258, 170),
    "left_elbow": Point(304, 194),
    "right_elbow": Point(244, 193),
    "left_wrist": Point(307, 218),
    "right_wrist": Point(241, 217),
    "left_hip": Point(287, 220),
    "right_hip": Point(265, 220),
    "left_knee": Point(289, 253),
    "right_knee": Point(262, 253),
    "left_ankle": Point(291, 286),
    "right_ankle": Point(259, 286),
}

TITLE = Box(40, 26, 320, 48)
TEXTS = (Box(30, 64, 172, 172), Box(30, 322, 172, 448), Box(188, 64, 330, 116))
LIST, TABLE, FIGURE = Box(188, 132, 330, 206), Box(188, 226, 330, 330), Box(30, 190, 172, 304)
LAST_TEXT = Box(188, 348, 330, 448)

BARS = {"2020": 12, "2021": 18, "2022": 27, "2023": 21}


class _Pen:
    """Draws in the finished picture's pixels on a larger canvas."""

    def __init__(self, width: int, height: int, colour: str) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), colour)
        self.draw = ImageDraw.Draw(self.image)

    @staticmethod
    def _scaled(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * SCALE, y * SCALE) for x, y in points]

    def box(self, box: Box, colour: str) -> None:
        self.draw.rectangle(self._scaled([(box.x1, box.y1), (box.x2, box.y2)]), fill=colour)

    def oval(self, box: Box, colour: str) -> None:
        self.draw.ellipse(self._scaled([(box.x1, box.y1), (box.x2, box.y2)]), fill=colour)

    def shape(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        self.draw.polygon(self._scaled(points), fill=colour)

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        places = [(point.x, point.y) for point in points]
        self.draw.line(self._scaled(places), fill=colour, width=round(width * SCALE), joint="curve")
        for x, y in places:
            self.oval(Box(x - width / 2, y - width / 2, x + width / 2, y + width / 2), colour)

    def words(self, text: str, box: Box, colour: str) -> None:
        """As large as the box is high, in its middle."""
        font = ImageFont.load_default(size=(box.y2 - box.y1) * 0.9 * SCALE)
        middle = ((box.x1 + box.x2) / 2 * SCALE, (box.y1 + box.y2) / 2 * SCALE)
        self.draw.text(middle, text, fill=colour, font=font, anchor="mm")

    def finish(self) -> Image.Image:
        size = (self.image.width // SCALE, self.image.height // SCALE)
        return self.image.resize(size, Image.Resampling.LANCZOS)


def _inside(box: Box, margin: float) -> Box:
    """What is drawn leaves room for its box's outline."""
    return Box(box.x1 + margin, box.y1 + margin, box.x2 - margin, box.y2 - margin)


def _ball(pen: _Pen, box: Box, colour: str) -> None:
    box = _inside(box, 3)
    pen.oval(Box(box.x1 - 2, box.y2 - 5, box.x2 + 6, box.y2 + 3), "#5c9150")
    pen.oval(box, colour)
    side = box.x2 - box.x1
    pen.oval(Box(box.x1 + side * 0.22, box.y1 + side * 0.16, box.x1 + side * 0.46, box.y1 + side * 0.4), "white")


def _child(pen: _Pen) -> None:
    at = JOINTS.__getitem__
    for side in ("left", "right"):
        pen.line([at(f"{side}_hip"), at(f"{side}_knee"), at(f"{side}_ankle")], "#39507a", 13)
        ankle = at(f"{side}_ankle")
        pen.line([ankle, Point(ankle.x + 7, ankle.y + 4)], "#4a3728", 11)
        pen.line([at(f"{side}_shoulder"), at(f"{side}_elbow"), at(f"{side}_wrist")], "#e0ac86", 10)
        pen.line([at(f"{side}_shoulder"), at(f"{side}_elbow")], "#3f9e57", 13)
    corners = ("left_shoulder", "right_shoulder", "right_hip", "left_hip")
    pen.line([at(name) for name in (*corners, corners[0])], "#3f9e57", 14)
    pen.shape([(at(name).x, at(name).y) for name in corners], "#3f9e57")
    pen.line([Point(276, 166), Point(277, 156)], "#e0ac86", 12)
    pen.oval(Box(258, 122, 296, 162), "#5b3a20")
    pen.oval(Box(265, 128, 296, 160), "#e0ac86")
    for eye in ("left_eye", "right_eye"):
        pen.oval(Box(at(eye).x - 2, at(eye).y - 2, at(eye).x + 2, at(eye).y + 2), "#2b2b2b")
    pen.oval(Box(at("nose").x - 1.5, at("nose").y - 1, at("nose").x + 1.5, at("nose").y + 3), "#c98d66")
    pen.line([Point(275, 151), Point(280, 153), Point(285, 151)], "#a03c3c", 2)


def scene() -> Image.Image:
    """A bakery, a tree, a child and three balls; 480 x 320."""
    pen = _Pen(480, 320, "#bfe3f5")
    pen.oval(Box(424, 14, 464, 54), "#ffd94a")
    pen.box(Box(0, 212, 480, 320), "#79b564")
    pen.box(Box(HOUSE.x1 + 12, 92, HOUSE.x2 - 12, HOUSE.y2), "#e8d3b0")
    pen.shape([(HOUSE.x1, 92), ((HOUSE.x1 + HOUSE.x2) / 2, HOUSE.y1), (HOUSE.x2, 92)], "#a8493a")
    pen.box(BAKERY, "#6a3f2a")
    pen.words("BAKERY", _inside(BAKERY, 3), "#fff4dc")
    for left in (48, 132):
        pen.box(Box(left, 130, left + 32, 160), "#8ec3de")
    pen.box(Box(88, 170, 124, HOUSE.y2), "#7a5230")
    pen.box(OPEN, "#f5f5f0")
    pen.words("OPEN", _inside(OPEN, 3), "#1d6b34")
    pen.box(Box(396, 150, 412, TREE.y2), "#7a5230")
    pen.oval(Box(TREE.x1, 84, 430, 170), "#3f8f4f")
    pen.oval(Box(378, TREE.y1, TREE.x2, 160), "#4aa35a")
    _child(pen)
    for box, colour in zip(BALLS, ("#d9352b", "#2f63c9", "#f0c419"), strict=True):
        _ball(pen, box, colour)
    return pen.finish()


def _lines(pen: _Pen, box: Box, colour: str = "#8d8d8d", indent: float = 0) -> None:
    box = _inside(box, 5)
    y, last = box.y1, box.y2 - 4
    while y <= last:
        is_end = y + 10 > last
        pen.box(Box(box.x1 + indent, y, box.x2 - (40 if is_end and not indent else 0), y + 4), colour)
        y += 10


def document() -> Image.Image:
    """A page in two columns with title, texts, list, table and figure; 360 x 480."""
    pen = _Pen(360, 480, "white")
    pen.words("On Round Things", TITLE, "#222222")
    for box in (*TEXTS, LAST_TEXT):
        _lines(pen, box)
    _lines(pen, LIST, indent=12)
    for y in range(round(LIST.y1) + 5, round(LIST.y2) - 8, 20):
        pen.oval(Box(LIST.x1 + 6, y - 0.5, LIST.x1 + 11, y + 4.5), "#222222")
    pen.box(_inside(FIGURE, 4), "#e4ecf4")
    pen.line([Point(40, 288), Point(72, 250), Point(104, 262), Point(136, 214), Point(162, 202)], "#c2452d", 3)
    for index in range(6):
        y = TABLE.y1 + 5 + index * (TABLE.y2 - TABLE.y1 - 12) / 5
        pen.box(Box(TABLE.x1 + 5, y, TABLE.x2 - 5, y + 1.2), "#333333")
    for index in range(5):
        y = TABLE.y1 + 12 + index * (TABLE.y2 - TABLE.y1 - 12) / 5
        for x in (198, 244, 290):
            pen.box(Box(x, y, x + 28, y + 5), "#555555" if index == 0 else "#a5a5a5")
    return pen.finish()


def chart() -> Image.Image:
    """Four bars with their numbers; 400 x 280."""
    pen = _Pen(400, 280, "white")
    pen.words("Balls sold (thousands)", Box(60, 12, 340, 32), "#222222")
    pen.box(Box(50, 240, 370, 242), "#333333")
    for index, (year, value) in enumerate(BARS.items()):
        left, top = 70 + index * 76, 240 - value * 6.5
        pen.box(Box(left, top, left + 48, 240), "#4a78b5")
        pen.words(str(value), Box(left, top - 19, left + 48, top - 3), "#222222")
        pen.words(year, Box(left, 248, left + 48, 264), "#222222")
    return pen.finish()


def fruit() -> Image.Image:
    """An apple; 240 x 240."""
    pen = _Pen(240, 240, "#f3efe6")
    pen.oval(Box(50, 190, 196, 216), "#d9d2c3")
    pen.oval(Box(48, 70, 136, 206), "#c8332b")
    pen.oval(Box(104, 70, 192, 206), "#c8332b")
    pen.oval(Box(72, 92, 98, 128), "#e98b80")
    pen.line([Point(120, 84), Point(124, 62), Point(134, 44)], "#5b3a20", 7)
    pen.shape([(128, 62), (150, 40), (182, 42), (164, 64)], "#4aa35a")
    return pen.finish()


PICTURES: dict[str, Callable[[], Image.Image]] = {"scene": scene, "page": document, "chart": chart, "fruit": fruit}
