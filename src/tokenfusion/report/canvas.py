"""Smooth lines, dots and names over an image, as they are wanted on pictures of boxes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Bytes = NDArray[np.uint8]
Colour = tuple[int, int, int]

FINE = 3  # everything is drawn this much larger and averaged
DASH, GAP = 7.0, 5.0  # pixels
CASING = (16, 18, 22)  # around lines, so that they show on any background
INK, PAPER = (22, 24, 28), (255, 255, 255)
FONT = 13  # pixels
PADDING = (5, 2)  # around a name


class Canvas:
    """An image to draw upon; pixels count from 0 at the centre of the first, (column, row).

    Args:
        image: uint8 [H, W, 3]; it is not changed.
    """

    def __init__(self, image: Bytes) -> None:
        self.height, self.width = image.shape[:2]
        self.base = Image.fromarray(image)
        self.layer = Image.new("RGBA", (self.width * FINE, self.height * FINE))
        self.pen = ImageDraw.Draw(self.layer)
        self.names: list[tuple[int, int, int, int, str, Colour, Colour]] = []  # left, top, right, bottom, ...
        self.words: list[tuple[float, float, str]] = []

    def line(
        self, points: NDArray[Any], colour: Colour, width: float, alpha: float = 1.0, dashed: bool = False
    ) -> None:
        """Straight lines from point to point [n, 2] with round ends."""
        ink = (*colour, round(255 * alpha))
        for start, end in itertools.pairwise(points):
            for a, b in _dashes(start, end) if dashed else [(start, end)]:
                self.pen.line([*self._fine(a), *self._fine(b)], ink, round(width * FINE))
                for tip in (a, b):
                    self._disc(tip, width / 2, ink)

    def dot(self, point: NDArray[Any], radius: float, colour: Colour, alpha: float = 1.0) -> None:
        """A disc around a point [2]."""
        self._disc(point, radius, (*colour, round(255 * alpha)))

    def area(self, points: NDArray[Any], colour: Colour, alpha: float = 1.0) -> None:
        """A filled polygon [n, 2]."""
        self.pen.polygon([self._fine(point) for point in points], (*colour, round(255 * alpha)))

    def name(self, text: str, at: NDArray[Any], paper: Colour, above: bool = True) -> None:
        """A name on a plate of the colour ``paper``, above or below a point [2], moved to where it covers no other."""
        width, height = math.ceil(text_width(text)) + 2 * PADDING[0], FONT + 2 * PADDING[1]
        x = min(max(round(at[0] - width / 2), 0), max(self.width - width, 0))
        y = round(at[1] - height - 3 if above else at[1] + 3)
        y = min(max(y, 0), self.height - height)
        for offset in sorted(range(-self.height, self.height, 2), key=abs):
            place = (x, y + offset, x + width, y + offset + height)
            if place[1] >= 0 and place[3] <= self.height and not any(_meet(place, other) for other in self.names):
                break
        else:
            return  # no room is left
        self.names.append((*place, text, paper, INK if _is_light(paper) else PAPER))

    def text(self, text: str, x: float, y: float) -> None:
        """Plain words, beginning at x, around the height y."""
        self.words.append((x, y, text))

    def finish(self) -> Bytes:
        """The picture, uint8 [H, W, 3]; names lie above everything."""
        over = self.layer.reduce(FINE)
        picture = self.base.convert("RGBA")
        picture.alpha_composite(over)
        plates = Image.new("RGBA", picture.size)
        pen, font = ImageDraw.Draw(plates), ImageFont.load_default(FONT)
        for left, top, right, bottom, text, paper, ink in self.names:
            pen.rounded_rectangle((left, top, right - 1, bottom - 1), 3, (*paper, 235), INK if paper == PAPER else None)
            pen.text(((left + right) / 2, (top + bottom) / 2), text, (*ink, 255), font, anchor="mm")
        for x, y, text in self.words:
            pen.text((x, y), text, (*INK, 255), font, anchor="lm")
        picture.alpha_composite(plates)
        return np.asarray(picture.convert("RGB"))

    def _fine(self, point: Sequence[float] | NDArray[Any]) -> tuple[float, float]:
        return (float(point[0]) + 0.5) * FINE - 0.5, (float(point[1]) + 0.5) * FINE - 0.5

    def _disc(self, point: Sequence[float] | NDArray[Any], radius: float, ink: tuple[int, ...]) -> None:
        x, y = self._fine(point)
        reach = radius * FINE
        self.pen.ellipse((x - reach, y - reach, x + reach, y + reach), ink)


def text_width(text: str) -> float:
    """Pixels that a name takes."""
    return float(ImageFont.load_default(FONT).getlength(text))


def _dashes(start: NDArray[Any], end: NDArray[Any]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """A line as dashes: a whole number of them, one at each end."""
    length = float(np.hypot(*(end - start)))
    count = max(round((length + GAP) / (DASH + GAP)), 1)
    period = (length + GAP) / count
    shares = [(k * period / length, (k * period + period - GAP) / length) for k in range(count)] if length > 0 else []
    return [(start + a * (end - start), start + b * (end - start)) for a, b in shares]


def _meet(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def _is_light(colour: Colour) -> bool:
    return bool(np.dot(colour, [0.299, 0.587, 0.114]) > 140)
