"""A small canvas for drawn scenes: soft-edged shapes and noise in numpy, each shape with the class of its pixels."""

import functools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def rgb(red: float, green: float, blue: float) -> Floats:
    """A colour, 0..255 a channel."""
    return np.array((red, green, blue), dtype=np.float32)


def smooth_step(value: Floats, low: float, high: float) -> Floats:
    """0 up to ``low``, 1 from ``high`` on (``low`` may be the larger), smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


@functools.lru_cache(maxsize=1024)
def _grid(length: int, cell: float) -> tuple[NDArray[np.intp], Floats]:
    position = np.arange(length, dtype=np.float32) / np.float32(cell)
    index = position.astype(np.intp)
    return index, smooth_step(position - index, 0, 1)


def noise(rng: np.random.Generator, size: tuple[int, int], cell: tuple[float, float], octaves: int = 1) -> Floats:
    """Fractal noise of ``size`` (H, W) in 0..1: random values ``cell`` pixels apart, smooth between.

    Each further octave has half the cell and half the weight of the one before.
    """
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        (i, s), (j, t) = (_grid(n, max(c / 2**octave, 1.0)) for n, c in zip(size, cell, strict=True))
        values = rng.random((i[-1] + 2, j[-1] + 2), dtype=np.float32)
        rows = values[i] + s[:, None] * (values[i + 1] - values[i])
        left = rows.take(j, 1)
        total += (left + t * (rows.take(j + 1, 1) - left)) * 0.5**octave
    return total / (2 - 2 * 0.5**octaves)


class Canvas:
    """A picture in the making and the class of each of its pixels.

    Drawing with the ``name`` of a class marks the pixels that are covered by half or more; without one it changes the
    colours alone. Shapes have soft edges and may reach over the border.

    Attributes:
        picture: (H, W, 3) float32 RGB in 0..255.
        label: (H, W) uint8, index into ``classes``.
        y, x: (H, 1) and (1, W) float32, coordinates of the pixels.
    """

    def __init__(self, size: tuple[int, int], classes: tuple[str, ...] = ()) -> None:
        self.classes = classes
        self.picture = np.zeros((*size, 3), dtype=np.float32)
        self.label = np.zeros(size, dtype=np.uint8)
        self.y = np.arange(size[0], dtype=np.float32)[:, None]
        self.x = np.arange(size[1], dtype=np.float32)[None, :]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.label.shape[0], self.label.shape[1]

    def window(self, top: float, bottom: float, left: float, right: float) -> "Canvas":
        """A view of the pixels that a rectangle touches, ends included; what is drawn there is drawn here."""
        rows = slice(*(max(int(row - self.y[0, 0]), 0) for row in (np.floor(top), np.ceil(bottom) + 1)))
        columns = slice(*(max(int(column - self.x[0, 0]), 0) for column in (np.floor(left), np.ceil(right) + 1)))
        view = object.__new__(Canvas)
        view.classes, view.picture, view.label = self.classes, self.picture[rows, columns], self.label[rows, columns]
        view.y, view.x = self.y[rows], self.x[:, columns]
        return view

    def paint(self, cover: Floats | NDArray[np.bool_], color: Floats, name: str | None = None) -> None:
        """Blend ``color`` in, ``cover`` (0..1) of it; both broadcast over the picture."""
        a = np.broadcast_to(np.asarray(cover, np.float32), self.size)[..., None]
        self.picture *= 1 - a
        self.picture += color * a  # this form gives exactly ``color`` where the cover is 1
        if name is not None:
            self.label[a[..., 0] >= 0.5] = self.classes.index(name)

    def box(self, top: float, bottom: float, left: float, right: float, color: Floats, name: str | None = None) -> None:
        """An upright rectangle."""
        view = self.window(top - 1, bottom + 1, left - 1, right + 1)
        rows = np.clip(view.y - top + 0.5, 0, 1) * np.clip(bottom - view.y + 0.5, 0, 1)
        view.paint(rows * np.clip(view.x - left + 0.5, 0, 1) * np.clip(right - view.x + 0.5, 0, 1), color, name)

    def disc(
        self,
        y: float,
        x: float,
        radius: float,
        color: Floats,
        name: str | None = None,
        *,
        flat: float = 1.0,
        foot: float = np.inf,
    ) -> None:
        """A disc, or an ellipse ``flat`` times as high as wide, cut off below the row ``foot``."""
        view = self.window(y - flat * radius - 1, min(y + flat * radius, foot) + 1, x - radius - 1, x + radius + 1)
        cover = np.clip(radius + 0.5 - np.hypot((view.y - y) / flat, view.x - x), 0, 1)
        view.paint(cover * np.clip(foot - view.y + 0.5, 0, 1), color, name)

    def cone(self, top: float, foot: float, x: float, slope: float, color: Floats, name: str | None = None) -> None:
        """An upright triangle that widens by ``slope`` to either side per pixel of height."""
        half = slope * (foot - top)
        view = self.window(top - 1, foot + 1, x - half - 1, x + half + 1)
        inside = np.clip(slope * (view.y - top) + 0.5 - np.abs(view.x - x), 0, 1)
        view.paint(inside * np.clip(view.y - top + 0.5, 0, 1) * np.clip(foot - view.y + 0.5, 0, 1), color, name)
